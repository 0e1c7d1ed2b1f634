#include "geglu.h"

#include <cmath>

namespace hdit {
namespace {

// Long rows are cut, so that a single one can occupy every thread.
constexpr int64_t kColumns = 8192;

// Φ(−a) for 0 <= a < kTailEnd by 16 polynomials in a − n·kStep, the n-th for the a that are nearest to n·kStep; rows are
// powers 0 to 5. Minimax fits of the relative error: in float32 2.6e-7 up to a = 3, 5e-5 at the end, where (1 + erf)/2 in
// float32 has lost all digits; 3.7e-8 absolute. For larger a it is taken for 0, and is below 3.1e-9.
constexpr float kStep = 0.375f, kTailEnd = 5.8125f;
alignas(64) constexpr float kTail[6][16] = {
    {0.5f, 0.353830248f, 0.22662735f, 0.130294517f, 0.066807203f, 0.0303963609f, 0.0122244712f, 0.00433244789f,
     0.00134989817f, 0.000369078654f, 8.84174224e-05f, 1.8536799e-05f, 3.39769372e-06f, 5.4404785e-07f, 7.60508314e-08f, 9.27562027e-09f},
    {-0.398942262f, -0.37185508f, -0.301137418f, -0.211876646f, -0.129517615f, -0.0687862933f, -0.0317396671f, -0.0127241854f,
     -0.00443184562f, -0.0013411144f, -0.000352592528f, -8.05389063e-05f, -1.59831579e-05f, -2.7557669e-06f, -4.12803757e-07f, -5.37234754e-08f},
    {-3.50560839e-07f, 0.0697210282f, 0.112924457f, 0.119179718f, 0.0971386284f, 0.0644880608f, 0.0357077681f, 0.0167006869f,
     0.0066477051f, 0.002263017f, 0.000661035068f, 0.000166076978f, 3.595015e-05f, 6.71388125e-06f, 1.0828669e-06f, 1.50958982e-07f},
    {0.0664978325f, 0.053257402f, 0.0219553448f, -0.00938035455f, -0.0269810464f, -0.0288376417f, -0.0214888118f, -0.0124918958f,
     -0.00590952905f, -0.00232303212f, -0.000767984544f, -0.000215155771f, -5.13454615e-05f, -1.04761566e-05f, -1.83248915e-06f, -2.75378284e-07f},
    {-6.76820928e-05f, -0.0164757259f, -0.0227791201f, -0.0171567686f, -0.00610489352f, 0.00269863312f, 0.00608580001f, 0.00539907906f,
     0.00332940882f, 0.0015922396f, 0.000616157893f, 0.000197135771f, 5.28100209e-05f, 1.19422029e-05f, 2.29248599e-06f, 3.75096334e-07f},
    {-0.00973449182f, -0.00664829789f, 0.000193498825f, 0.00526093831f, 0.00580738299f, 0.0032305026f, 0.000435411435f, -0.000968152017f,
     -0.00109567086f, -0.000708005566f, -0.00033486326f, -0.000124616665f, -3.76925673e-05f, -9.4331981e-06f, -1.97513714e-06f, -3.4858158e-07f},
};

// The same for bfloat16, with powers 0 to 3: off by 2e-5 up to a = 2, 4e-4 up to 3, 6e-3 at the end; its rounding is 4e-3.
alignas(64) constexpr float kCoarseTail[4][16] = {
    {0.5f, 0.353832722f, 0.226630792f, 0.13029708f, 0.066808112f, 0.0303960033f, 0.0122236386f, 0.00433172379f,
     0.00134946452f, 0.000368878565f, 8.83431203e-05f, 1.85141143e-05f, 3.3919282e-06f, 5.42818498e-07f, 7.58297958e-08f, 9.24199561e-09f},
    {-0.398947448f, -0.371842921f, -0.30112353f, -0.211867049f, -0.129515812f, -0.0687911212f, -0.0317471884f, -0.0127308061f,
     -0.00443610642f, -0.0013432696f, -0.000353477139f, -8.0838814e-05f, -1.60680756e-05f, -2.77599884e-06f, -4.16881647e-07f, -5.44216014e-08f},
    {0.000142161996f, 0.0691451952f, 0.112128668f, 0.118581332f, 0.0969257206f, 0.0645794272f, 0.0359155424f, 0.0168841369f,
     0.00676005706f, 0.002316311f, 0.000681468402f, 0.000172547501f, 3.76640273e-05f, 7.09670894e-06f, 1.1553858e-06f, 1.62656207e-07f},
    {0.0655372962f, 0.052600909f, 0.0214333329f, -0.00959103182f, -0.0268794093f, -0.0285576973f, -0.0211876202f, -0.0122655677f,
     -0.00577706471f, -0.00226016063f, -0.000743298326f, -0.000207043719f, -4.909782e-05f, -9.94831862e-06f, -1.72702403e-06f, -2.57397033e-07f},
};

// Φ(g)
template <int kPowers>
inline FloatVector normal_cdf(FloatVector g, const float (&table)[kPowers][16]) {
  const FloatVector a = (FloatVector)((IntVector)g & 0x7fffffff);
  const FloatVector rounder = FloatVector{} + 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, in the low bits
  const FloatVector shifted = a * (1 / kStep) + rounder;
  const IntVector n = (IntVector)shifted & 15;
  const FloatVector x = a - (shifted - rounder) * kStep;
  FloatVector tail = lookup(table[kPowers - 1], n);
  for (int power = kPowers - 2; power >= 0; --power) tail = tail * x + lookup(table[power], n);
  tail = (a >= kTailEnd) ? FloatVector{} : tail;  // not of NaN
  return (g < 0.0f) ? tail : 1.0f - tail;
}

// φ(g)
inline FloatVector normal_density(FloatVector g) {
  const FloatVector exponent = g * g * -0.5f;
  return exp((exponent < -88.2f) ? FloatVector{} - 88.2f : exponent) * 0.3989422804f;
}

inline DoubleVector normal_cdf(DoubleVector g) {
  DoubleVector result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = 0.5 * std::erfc(g[i] * -0.70710678118654752440);
  return result;
}

inline DoubleVector normal_density(DoubleVector g) {
  DoubleVector result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = 0.39894228040143267794 * std::exp(-0.5 * g[i] * g[i]);
  return result;
}

// Results of more bytes than this are written past the caches.
constexpr int64_t kStreamedBytes = int64_t(1) << 26;

template <class T>
constexpr bool kCoarse = false;
template <>
constexpr bool kCoarse<BFloat16> = true;

// Φ(g) as elements T need it.
template <class T>
inline Vector<T> cdf_for(Vector<T> g) {
  if constexpr (sizeof(T) == sizeof(double)) return normal_cdf(g);
  else if constexpr (kCoarse<T>) return normal_cdf(g, kCoarseTail);
  else return normal_cdf(g, kTail);
}

// Asks for what the next row has of a row of 2n elements, two vectors a step. Value and gate are two streams that jump at every
// row, too short for the hardware to run ahead of. Short rows are asked for in the order of memory: a float32 forward out of
// cache then takes 0.7 times as long as where value and gate are asked for side by side, and 0.6 times as long as without. Of
// long rows, which do not stay in the first-level cache for a whole row, side by side is better. Past the end it does no harm.
template <int kWrite, class T>
struct NextRow {
  static constexpr int64_t kShort = 16384;  // bytes
  const T *first, *second;
  int64_t step;

  NextRow(const T* next, int64_t n) {
    const bool is_short = 2 * n * int64_t(sizeof(T)) <= kShort;
    first = next, second = next + (is_short ? kLanes<T> : n), step = is_short ? 2 : 1;
  }
  void ask(int64_t i) const {
    __builtin_prefetch(first + step * i, kWrite);
    __builtin_prefetch(second + step * i, kWrite);
  }
};

template <bool kStream, class T, class V, class Part>
inline void write(T* p, V v, Part part) {
  if (kStream) stream(p, v, part);
  else store(p, v, part);
}

// body(row, first column, columns) over the whole (rows, n) plane.
template <class Body>
inline void for_each_piece(int64_t rows, int64_t n, int threads, Body body) {
  if (rows == 0 || n == 0) return;
  const int64_t pieces = (n + kColumns - 1) / kColumns;
  parallel_for(rows * pieces, useful_threads(rows * n, threads), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / pieces, column = unit % pieces * kColumns;
      body(row, column, n - column < kColumns ? n - column : kColumns);
    }
    end_streaming();
  });
}

template <class T, bool kStream>
void forward(const GegluForward& args, int threads) {
  for_each_piece(args.rows, args.n, threads, [&](int64_t row, int64_t column, int64_t columns) {
    const T* value = static_cast<const T*>(args.x) + row * args.x_row_stride + column;
    const T* gate = value + args.n;
    T* y = static_cast<T*>(args.y) + row * args.n + column;
    const NextRow<0, T> next(value + args.x_row_stride, args.n);
    for_each_vector<T>(columns, [&](int64_t i, auto part) {
      next.ask(i);
      const auto g = load(gate + i, part);
      write<kStream>(y + i, load(value + i, part) * (g * cdf_for<T>(g)), part);
    });
  });
}

template <class T, bool kStream>
void backward(const GegluBackward& args, int threads) {
  for_each_piece(args.rows, args.n, threads, [&](int64_t row, int64_t column, int64_t columns) {
    const T* value = static_cast<const T*>(args.x) + row * args.x_row_stride + column;
    const T* gate = value + args.n;
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_row_stride + column;
    T* dvalue = static_cast<T*>(args.dx) + row * 2 * args.n + column;
    T* dgate = dvalue + args.n;
    const NextRow<0, T> next(value + args.x_row_stride, args.n);
    const NextRow<1, T> next_result(dvalue + 2 * args.n, args.n);
    for_each_vector<T>(columns, [&](int64_t i, auto part) {
      next.ask(i);
      if (!kStream) next_result.ask(i);
      const auto g = load(gate + i, part), d = load(dy + i, part);
      const auto cdf = cdf_for<T>(g);
      write<kStream>(dvalue + i, d * (g * cdf), part);
      write<kStream>(dgate + i, d * load(value + i, part) * (cdf + g * normal_density(g)), part);
    });
  });
}

}  // namespace

template <class InstructionSet>
void geglu_forward(const GegluForward& args, int threads) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t row_bytes = args.n * int64_t(sizeof(T));
    const bool streams = sizeof(T) >= 4 && args.rows * row_bytes > kStreamedBytes && can_stream(args.y, row_bytes);
    if (streams) forward<T, sizeof(T) >= 4>(args, threads);
    else forward<T, false>(args, threads);
  });
}

template <class InstructionSet>
void geglu_backward(const GegluBackward& args, int threads) {
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t row_bytes = args.n * int64_t(sizeof(T));
    const bool streams = sizeof(T) >= 4 && 2 * args.rows * row_bytes > kStreamedBytes && can_stream(args.dx, row_bytes);
    if (streams) backward<T, sizeof(T) >= 4>(args, threads);
    else backward<T, false>(args, threads);
  });
}

template void geglu_forward<Native>(const GegluForward&, int);
template void geglu_backward<Native>(const GegluBackward&, int);

}  // namespace hdit
