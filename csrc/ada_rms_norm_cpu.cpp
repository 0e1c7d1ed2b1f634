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

// Rows are taken in blocks that stay in the first-level cache: first the sums of all rows, then their roots, then what is
// written. One row after the other would wait for its root, and the processor looks ahead at too few others meanwhile.
constexpr int64_t kRowsPerBlock = 16, kBytesPerBlock = 4096;

template <class T>
inline int64_t rows_per_block(int64_t n) {
  const int64_t fit = kBytesPerBlock / int64_t(n * sizeof(T));
  return fit < 1 ? 1 : fit < kRowsPerBlock ? fit : kRowsPerBlock;
}

// body(sample, first token, tokens) over blocks of rows [begin, end); a block lies within one sample.
template <class Body>
inline void for_each_block(int64_t begin, int64_t end, int64_t tokens, int64_t step, Body body) {
  while (begin < end) {
    const int64_t sample = begin / tokens, token = begin % tokens;
    int64_t count = tokens - token < step ? tokens - token : step;
    count = end - begin < count ? end - begin : count;
    body(sample, token, count);
    begin += count;
  }
}

template <class T>
void forward(const AdaRmsNormForward& args, int threads) {
  using S = Scalar<T>;
  const int64_t n = args.channels, rows = args.batch * args.tokens;
  if (n == 0) return;
  parallel_for(rows, useful_threads(rows * n, threads), [&](int64_t begin, int64_t end) {
    for_each_block(begin, end, args.tokens, rows_per_block<T>(n), [&](int64_t sample, int64_t token, int64_t count) {
      const int64_t stride = args.x_token_stride;
      const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * stride;
      const S* scale = static_cast<const S*>(args.scale) + sample * args.scale_batch_stride;
      T* y = static_cast<T*>(args.y) + (sample * args.tokens + token) * n;
      S inverse_rms[kRowsPerBlock];
      for (int64_t r = 0; r < count; ++r) {
        S squares[1];
        reduce<T>(n, squares, [&](int64_t i, auto part, Vector<T>(&sums)[1]) {
          const auto v = load(x + r * stride + i, part);
          sums[0] += v * v;
        });
        inverse_rms[r] = squares[0];
      }
      for (int64_t r = 0; r < count; ++r) inverse_rms[r] = 1 / std::sqrt(inverse_rms[r] / S(n) + S(args.eps));
      for (int64_t r = 0; r < count; ++r)
        for_each_vector<T>(n, [&](int64_t i, auto part) {
          store(y + r * n + i, load(x + r * stride + i, part) * inverse_rms[r] * load(scale + i, part), part);
        });
    });
  });
}

// Tokens that share a scale: dx = r·scale·dy − x·(r³/C)·Σ(dy·scale·x) with r = rsqrt(mean(x²) + eps), and dscale (+)= r·dy·x.
template <class T, bool kDx, bool kDscale, class S = Scalar<T>>
inline void backward_block(const T* x, int64_t x_stride, const S* scale, const T* dy, int64_t dy_stride, T* dx, S* dscale,
                           bool first, int64_t count, int64_t n, S eps) {
  S inverse_rms[kRowsPerBlock], along_x[kRowsPerBlock];
  for (int64_t r = 0; r < count; ++r) {
    S totals[2];
    reduce<T>(n, totals, [&](int64_t i, auto part, Vector<T>(&sums)[2]) {
      const auto v = load(x + r * x_stride + i, part);
      sums[0] += v * v;
      if (kDx) sums[1] += v * load(dy + r * dy_stride + i, part) * load(scale + i, part);
    });
    inverse_rms[r] = totals[0], along_x[r] = totals[1];
  }
  for (int64_t r = 0; r < count; ++r) {
    inverse_rms[r] = 1 / std::sqrt(inverse_rms[r] / S(n) + eps);
    along_x[r] *= inverse_rms[r] * inverse_rms[r] / S(n);
  }
  for (int64_t r = 0; r < count; ++r) {
    const bool fresh = first && r == 0;
    for_each_vector<T>(n, [&](int64_t i, auto part) {
      const auto v = load(x + r * x_stride + i, part), d = load(dy + r * dy_stride + i, part) * inverse_rms[r];
      if (kDx) store(dx + r * n + i, d * load(scale + i, part) - v * (along_x[r] * inverse_rms[r]), part);
      if (kDscale) store(dscale + i, fresh ? v * d : v * d + load(dscale + i, part), part);
    });
  }
}

template <class T, bool kDx, bool kDscale>
void backward(const AdaRmsNormBackward& args, int threads) {
  const int64_t n = args.channels;
  if (n == 0) return;
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
      bool fresh = true;
      for_each_block(group * rows + first, group * rows + last, args.tokens, rows_per_block<T>(n),
                     [&](int64_t sample, int64_t token, int64_t count) {
        backward_block<T, kDx, kDscale>(
            static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride, args.x_token_stride,
            static_cast<const Scalar<T>*>(args.scale) + sample * args.scale_batch_stride,
            static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride,
            args.dy_token_stride, kDx ? static_cast<T*>(args.dx) + (sample * args.tokens + token) * n : nullptr,
            kDscale ? partial + unit * n : nullptr, fresh, count, n, Scalar<T>(args.eps));
        fresh = false;
      });
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
