#include "ada_rms_norm.h"

#include <cmath>

namespace hdit {
namespace {

// dscale is a sum over tokens. Chunks of tokens are summed apart and their sums in order; chunks depend on the shape alone,
// so the result has the same bits for any number of threads.
constexpr int64_t kChunksPerSample = 64;
constexpr int64_t kTokensPerChunk = 16;

// Adds body(i, part, sums) over the vectors of a row; four independent sets of sums hide the latency of additions.
template <class T, int kSums, class Body>
inline void reduce(int64_t n, Scalar<T> (&result)[kSums], Body body) {
  constexpr int kUnroll = 4;
  Vector<T> sums[kUnroll][kSums] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes<T> <= n; i += kUnroll * kLanes<T>)
    for (int k = 0; k < kUnroll; ++k) body(i + k * kLanes<T>, Full{}, sums[k]);
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, Full{}, sums[0]);
  if (i < n) body(i, Partial{n - i}, sums[1]);
  for (int s = 0; s < kSums; ++s) result[s] = sum_lanes((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
}

template <class T>
void forward(const AdaRmsNormForward& args, int threads) {
  const int64_t n = args.channels, rows = args.batch * args.tokens;
  parallel_for(rows, useful_threads(rows * n, threads), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
      const auto* scale = static_cast<const Scalar<T>*>(args.scale) + sample * args.scale_batch_stride;
      T* y = static_cast<T*>(args.y) + row * n;
      Scalar<T> squares[1];
      reduce<T>(n, squares, [&](int64_t i, auto part, Vector<T>(&sums)[1]) {
        const auto v = load(x + i, part);
        sums[0] += v * v;
      });
      const Scalar<T> inverse_rms = 1 / std::sqrt(squares[0] / Scalar<T>(n) + Scalar<T>(args.eps));
      for_each_vector<T>(n, [&](int64_t i, auto part) {
        store(y + i, load(x + i, part) * inverse_rms * load(scale + i, part), part);
      });
    }
  });
}

// One token: dx = r·scale·dy − x·(r³/C)·Σ(dy·scale·x) with r = rsqrt(mean(x²) + eps), and dscale (+)= r·dy·x.
template <class T, bool kDx, bool kDscale>
inline void backward_token(const T* x, const Scalar<T>* scale, const T* dy, T* dx, Scalar<T>* dscale, bool first, int64_t n,
                           Scalar<T> eps) {
  Scalar<T> totals[2];
  reduce<T>(n, totals, [&](int64_t i, auto part, Vector<T>(&sums)[2]) {
    const auto v = load(x + i, part);
    sums[0] += v * v;
    if (kDx) sums[1] += v * load(dy + i, part) * load(scale + i, part);
  });
  const Scalar<T> inverse_rms = 1 / std::sqrt(totals[0] / Scalar<T>(n) + eps);
  const Scalar<T> along_x = inverse_rms * inverse_rms * totals[1] / Scalar<T>(n);
  for_each_vector<T>(n, [&](int64_t i, auto part) {
    const auto v = load(x + i, part), d = load(dy + i, part);
    if (kDx) store(dx + i, (d * load(scale + i, part) - v * along_x) * inverse_rms, part);
    if (kDscale) {
      const auto term = v * d * inverse_rms;
      store(dscale + i, first ? term : term + load(dscale + i, part), part);
    }
  });
}

template <class T, bool kDx, bool kDscale>
void backward(const AdaRmsNormBackward& args, int threads) {
  const int64_t n = args.channels;
  const bool shared = args.scale_batch_stride == 0;
  // Rows whose scale is the same vector form a group, and each group is cut into chunks.
  const int64_t groups = shared ? 1 : args.batch, rows = shared ? args.batch * args.tokens : args.tokens;
  const int64_t even = (rows + kChunksPerSample - 1) / kChunksPerSample;
  const int64_t chunk = even > kTokensPerChunk ? even : kTokensPerChunk;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  auto* dscale = static_cast<Scalar<T>*>(args.dscale);
  const Scratch<Scalar<T>> scratch(kDscale && chunks > 1 ? groups * chunks * n : 0);
  Scalar<T>* partial = chunks > 1 ? scratch.get() : dscale;

  threads = useful_threads(groups * rows * n, threads);
  parallel_for(groups * chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / chunks, first = unit % chunks * chunk;
      const int64_t last = rows - first < chunk ? rows : first + chunk;
      for (int64_t row = group * rows + first; row < group * rows + last; ++row) {
        const int64_t sample = row / args.tokens, token = row % args.tokens;
        backward_token<T, kDx, kDscale>(
            static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride,
            static_cast<const Scalar<T>*>(args.scale) + sample * args.scale_batch_stride,
            static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride,
            kDx ? static_cast<T*>(args.dx) + row * n : nullptr, kDscale ? partial + unit * n : nullptr,
            row == group * rows + first, n, Scalar<T>(args.eps));
      }
    }
  });
  if (!kDscale || chunks == 1) return;
  if (chunks == 0) {  // a sum over no tokens
    if (dscale != nullptr) std::memset(dscale, 0, groups * n * sizeof(Scalar<T>));
    return;
  }
  for (int64_t group = 0; group < groups; ++group)
    for_each_vector<T>(n, [&](int64_t i, auto part) {
      Vector<T> sum = {};
      for (int64_t c = 0; c < chunks; ++c) sum += load(partial + (group * chunks + c) * n + i, part);
      store(dscale + group * n + i, sum, part);
    });
}

}  // namespace

template <class InstructionSet>
void ada_rms_norm_forward(const AdaRmsNormForward& args, int threads) {
  with_element_type(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}

template <class InstructionSet>
void ada_rms_norm_backward(const AdaRmsNormBackward& args, int threads) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (args.dx != nullptr && args.dscale != nullptr) backward<T, true, true>(args, threads);
    else if (args.dx != nullptr) backward<T, true, false>(args, threads);
    else if (args.dscale != nullptr) backward<T, false, true>(args, threads);
  });
}

template void ada_rms_norm_forward<Native>(const AdaRmsNormForward&, int);
template void ada_rms_norm_backward<Native>(const AdaRmsNormBackward&, int);

}  // namespace hdit
