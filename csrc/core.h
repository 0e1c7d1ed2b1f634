// What every CPU kernel stands on: element types, one portable SIMD vector type, exp, parallel loops.
//
// A *_cpu.cpp file is written once over this header and compiled once per instruction set (CMakeLists.txt); bindings.cpp
// chooses at run time. Everything with a body therefore lives in an anonymous namespace: were a function compiled for
// AVX-512 visible to the linker, it could replace its twin in the baseline and crash an older CPU. For the same reason
// these files use no templates of the C++ standard library.
#pragma once

#include <cstdint>

namespace hdit {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A (batch, height, width, heads, size) tensor, or (batch, tokens, heads, size) with height_stride unused. Strides count
// elements; the last axis is contiguous.
struct Tokens {
  void* data;
  int64_t batch_stride, height_stride, width_stride, head_stride;
};

// Instruction sets: a CPU kernel is a function template over one of these, instantiated by the file compiled for it.
struct Baseline {};  // 128-bit vectors: SSE2 on x86-64, NEON on ARM
struct Avx2 {};      // x86-64-v3: AVX2, FMA, F16C
struct Avx512 {};    // x86-64-v4: AVX-512 F, BW, CD, DQ, VL
struct Avx512Bf16 {};  // and products of pairs of bfloat16

}  // namespace hdit

#if defined(__CUDACC__) || defined(HDIT_EMULATION)  // CUDA files want the types above, and take the rest from core.cuh
#define HDIT_DEVICE_CODE
#else

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hdit {
namespace {

#if defined(__AVX512BF16__)
using Native = Avx512Bf16;
constexpr int kVectorBytes = 64;
#elif defined(__AVX512F__)
using Native = Avx512;
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
using Native = Avx2;
constexpr int kVectorBytes = 32;
#else
using Native = Baseline;
constexpr int kVectorBytes = 16;
#endif

// ---- vectors ---------------------------------------------------------------------------------------------------------
// GCC and Clang vector extensions: arithmetic, comparisons and `mask ? a : b` work lane by lane.
typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));

// Arithmetic is in float32, for float64 elements in float64.
template <class T>
struct ComputeOf {
  using Scalar = float;
  using Vector = FloatVector;
};
template <>
struct ComputeOf<double> {
  using Scalar = double;
  using Vector = DoubleVector;
};
template <class T>
using Scalar = typename ComputeOf<T>::Scalar;
template <class T>
using Vector = typename ComputeOf<T>::Vector;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(Scalar<T>));

inline FloatVector to_float(const float* p) {
  FloatVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline DoubleVector to_float(const double* p) {
  DoubleVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Each 16-bit lane in 32 bits, and back; GCC 12 makes several instructions of __builtin_convertvector here.
inline UintVector widen(ShortVector bits) {
#if defined(__AVX512F__)
  return (UintVector)_mm512_cvtepu16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (UintVector)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, UintVector);
#endif
}

inline ShortVector narrow(UintVector bits) {
#if defined(__AVX512F__)
  return (ShortVector)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  const __m256i low = _mm256_blend_epi16((__m256i)bits, __m256i{}, 0xaa);
  return (ShortVector)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
#else
  return __builtin_convertvector(bits, ShortVector);
#endif
}

#if defined(__AVX512F__)
// Words of 16 bits as pairs (low, high): of each 32-bit lane i, the word i twice; and the words 2i + 1.
constexpr UintVector kEvenWords = {0x00000000, 0x00010001, 0x00020002, 0x00030003, 0x00040004, 0x00050005, 0x00060006, 0x00070007,
                                   0x00080008, 0x00090009, 0x000a000a, 0x000b000b, 0x000c000c, 0x000d000d, 0x000e000e, 0x000f000f};
constexpr UintVector kOddWords = {0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015, 0x001b0019, 0x001f001d};
#endif

inline FloatVector to_float(const BFloat16* p) {
#if defined(__AVX512F__)
  // Word i goes to word 2i + 1, between zeros: one instruction where widening and shifting are two.
  const __m512i bits = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (FloatVector)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(kEvenWords), bits);
#else
  ShortVector bits;
  std::memcpy(&bits, p, sizeof bits);
  return (FloatVector)(widen(bits) << 16);
#endif
}

inline FloatVector to_float(const Float16* p) {
  ShortVector bits;
  std::memcpy(&bits, p, sizeof bits);
#if defined(__AVX512F__)
  return (FloatVector)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
  return (FloatVector)_mm256_cvtph_ps((__m128i)bits);
#else
  const UintVector wide = widen(bits);
  const UintVector magnitude = wide & 0x7fff;
  // The exponents of the formats differ by 112; the product also makes float16's subnormal numbers normal.
  const FloatVector finite = (FloatVector)(magnitude << 13) * 0x1p112f;
  const UintVector special = (magnitude << 13) | 0x7f800000u;  // infinity or NaN
  return (FloatVector)(((magnitude >= 0x7c00) ? special : (UintVector)finite) | ((wide & 0x8000) << 16));
#endif
}

inline void from_float(float* p, FloatVector v) { std::memcpy(p, &v, sizeof v); }
inline void from_float(double* p, DoubleVector v) { std::memcpy(p, &v, sizeof v); }

inline void from_float(BFloat16* p, FloatVector v) {
  // Round to nearest even in integers: the bfloat16 instructions of AVX-512 would flush subnormal numbers.
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v, nan = _mm512_set1_epi32(0x7fc00000);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i half = _mm512_mask_add_epi32(nan, number, bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __m256i result = _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)kOddWords, rounded));
  _mm256_storeu_si256((__m256i*)p, result);
#else
  const UintVector bits = (UintVector)v;
  const UintVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVector result = narrow((v == v) ? rounded : UintVector{} + 0x7fc0);
  std::memcpy(p, &result, sizeof result);
#endif
}

inline void from_float(Float16* p, FloatVector v) {
#if defined(__AVX512F__)
  const ShortVector result = (ShortVector)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const ShortVector result = (ShortVector)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const UintVector bits = (UintVector)v;
  const UintVector magnitude = bits & 0x7fffffff;
  // Subnormal results: adding 0.5 lets the adder round at the right bit. Normal ones: shift the exponent and round to even.
  const UintVector subnormal = (UintVector)((FloatVector)magnitude + 0.5f) - 0x3f000000u;
  const UintVector normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  UintVector half = (magnitude < 0x38800000u) ? subnormal : normal;
  half = (magnitude >= 0x47800000u) ? (magnitude & 0) + 0x7c00 : half;  // 65536 and above
  half = (v == v) ? half : ((magnitude >> 13) & 0x1ff) + 0x7e00;
  const ShortVector result = narrow(half | ((bits >> 16) & 0x8000));
#endif
  std::memcpy(p, &result, sizeof result);
}

// A loop over a row calls its body with Full{} for whole vectors, then with Partial{count} for what is left. Missing lanes
// are read as zeros and not written.
struct Full {};
struct Partial {
  int64_t count;
};

template <class T>
inline Vector<T> load(const T* p, Full) {
  return to_float(p);
}

// Missing lanes by masks where the instruction set has them; a copy of variable size is a call. AddressSanitizer sees copies,
// but no masked accesses.
#if defined(__AVX512F__) && !defined(HDIT_SANITIZE)
template <class T>
inline Vector<T> load(const T* p, Partial tail) {
  const unsigned mask = (1u << tail.count) - 1;
  T lanes[kLanes<T>];
  if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    std::memcpy(lanes, &bits, sizeof bits);
  } else if constexpr (sizeof(T) == 4) {
    const __m512i bits = _mm512_maskz_loadu_epi32(__mmask16(mask), p);
    std::memcpy(lanes, &bits, sizeof bits);
  } else {
    const __m512i bits = _mm512_maskz_loadu_epi64(__mmask8(mask), p);
    std::memcpy(lanes, &bits, sizeof bits);
  }
  return to_float(lanes);
}
#else
template <class T>
inline Vector<T> load(const T* p, Partial tail) {
  T lanes[kLanes<T>] = {};
  std::memcpy(lanes, p, tail.count * sizeof(T));
  return to_float(lanes);
}
#endif

template <class T>
inline void store(T* p, Vector<T> v, Full) {
  from_float(p, v);
}

#if defined(__AVX512F__) && !defined(HDIT_SANITIZE)
template <class T>
inline void store(T* p, Vector<T> v, Partial tail) {
  const unsigned mask = (1u << tail.count) - 1;
  T lanes[kLanes<T>];
  from_float(lanes, v);
  if constexpr (sizeof(T) == 2) {
    __m256i bits;
    std::memcpy(&bits, lanes, sizeof bits);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), bits);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, __mmask16(mask), (__m512i)v);
  } else {
    _mm512_mask_storeu_epi64(p, __mmask8(mask), (__m512i)v);
  }
}
#else
template <class T>
inline void store(T* p, Vector<T> v, Partial tail) {
  T lanes[kLanes<T>];
  from_float(lanes, v);
  std::memcpy(p, lanes, tail.count * sizeof(T));
}
#endif

// Stores past the caches, for results that are larger: a line is not read before it is overwritten. p must be aligned to a
// vector (`can_stream`), and a thread that has streamed calls `end_streaming`. 16-bit elements would fill half lines: stored.
template <class T>
inline void stream(T* p, Vector<T> v, Full) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) >= 4) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  store(p, v, Full{});
}

template <class T>
inline void stream(T* p, Vector<T> v, Partial tail) {
  store(p, v, tail);
}

inline bool can_stream(const void* p, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 && row_bytes % kVectorBytes == 0;
}

inline void end_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <class T, class Body>
inline void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, Full{});
  if (i < n) body(i, Partial{n - i});
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The sum of all lanes, in a fixed order: halves are added until one lane is left.
inline float sum_lanes(FloatVector v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);  // (GCC 12 warns of its own _mm512_extractf32x8_ps)
  const __m256 eight = _mm256_add_ps(halves[0], halves[1]);
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

template <class V>
inline auto sum_lanes(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) parts[lanes];
  std::memcpy(parts, &v, sizeof v);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// sums += x, lane by lane, in float64.
template <class S>
constexpr int kWidened = sizeof(double) / sizeof(S);

inline void add_widened(DoubleVector (&sums)[2], FloatVector x) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  for (int i = 0; i < 2; ++i) sums[i] += __builtin_convertvector(halves[i], DoubleVector);
}

inline void add_widened(DoubleVector (&sums)[1], DoubleVector x) { sums[0] += x; }

// exp(x) for -88.3 < x <= 88, within 2 units in the last place: x = n·ln 2 + r, a polynomial in r, and 2ⁿ by its exponent
// bits. Results below 2⁻¹²⁶ become 0.
inline FloatVector exp(FloatVector x) {
  const FloatVector rounder = FloatVector{} + 12582912.0f;  // 1.5·2²³: adding it rounds to an integer
  const FloatVector shifted = x * 1.44269504f + rounder;
  const FloatVector n = shifted - rounder;
  const FloatVector r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first of 9 bits
  FloatVector p = FloatVector{} + 1.3814467e-3f;
  p = p * r + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r * r + r + 1.0f;
  const IntVector exponent = ((IntVector)shifted - (IntVector)rounder + 127) << 23;
  return p * (FloatVector)exponent;
}

// table[index] lane by lane, for 0 <= index < 16. Two or three instructions where a gather from memory takes dozens.
inline FloatVector lookup(const float (&table)[16], IntVector index) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)index);
  return (FloatVector)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // bit 3 becomes the sign
#else
  FloatVector result;
  for (int i = 0; i < kVectorBytes / int(sizeof(float)); ++i) result[i] = table[index[i]];
  return result;
#endif
}

// 2^x for -126 <= x < 128, within 2 units in the last place; 0 below, NaN of NaN.
inline FloatVector exp2(FloatVector x) {
  const FloatVector rounder = FloatVector{} + (12582912.0f + 127.0f);  // the low bits of x + rounder: the exponent of 2^n
  const FloatVector shifted = x + rounder;
  const FloatVector f = x - (shifted - rounder);
  FloatVector p = FloatVector{} + 1.327647129e-3f;
  p = p * f + 9.675540961e-3f;
  p = p * f + 5.550713092e-2f;
  p = p * f + 2.402212024e-1f;
  p = p * f + 6.931469440e-1f;
  p = p * f + 1.0f;
  const FloatVector result = p * (FloatVector)((IntVector)shifted << 23);
  return (x < -126.0f) ? FloatVector{} : result;
}

inline DoubleVector exp2(DoubleVector x) {
  DoubleVector result;
  for (int i = 0; i < kVectorBytes / int(sizeof(double)); ++i) result[i] = __builtin_exp2(x[i]);
  return result;
}

// ln x for positive normal x, within 2 units in the last place or 1e-7; -inf of 0, NaN of NaN.
inline FloatVector log(FloatVector x) {
  const IntVector bits = (IntVector)x - 0x3f3504f3;  // of sqrt(1/2): the exponent below rounds x to [sqrt(1/2), sqrt(2))
  const FloatVector n = __builtin_convertvector(bits >> 23, FloatVector);
  const FloatVector f = (FloatVector)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  FloatVector p = FloatVector{} + 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const FloatVector square = f * f;
  const FloatVector result = n * 0.693359375f + (f + (n * -2.12194440e-4f + (f * square * p - 0.5f * square)));
  return (x > 0.0f) ? result : (x == 0.0f) ? FloatVector{} - __builtin_inff() : x;
}

inline DoubleVector log(DoubleVector x) {
  DoubleVector result;
  for (int i = 0; i < kVectorBytes / int(sizeof(double)); ++i) result[i] = __builtin_log(x[i]);
  return result;
}

// ---- cos and sin -----------------------------------------------------------------------------------------------------
// For finite |x| < kFarAngle, within 2 units in the last place or, next to a zero, 5e-11: x = n·π/2 + r, polynomials in r,
// and the quadrant chooses. n·(π/2) is subtracted in three parts; the first two have 11 bits, so their products are exact
// also without fused multiply-add. The polynomials are minimax fits of the relative error on |r| <= π/4: 4e-9 and 2e-10.
constexpr float kFarAngle = 8192;

inline void sincos(FloatVector x, FloatVector& cos, FloatVector& sin) {
  const FloatVector rounder = FloatVector{} + 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, in the low bits
  const FloatVector shifted = x * 0.636619772f + rounder;
  const FloatVector n = shifted - rounder;
  const FloatVector r = x - n * 1.5703125f - n * 4.837512969970703125e-4f - n * 7.549790126404332e-8f, z = r * r;
  const FloatVector sin_r = r + r * z * ((z * -1.9514957e-4f + 8.332158e-3f) * z - 0.16666655f);
  const FloatVector cos_r = 1.0f - z * 0.5f + z * z * ((z * 2.4432784e-5f - 1.3887313e-3f) * z + 0.041666646f);
  const IntVector quadrant = (IntVector)shifted, odd = (quadrant << 31) >> 31;
  const IntVector turned_cos = (odd & (IntVector)sin_r) | (~odd & (IntVector)cos_r);
  const IntVector turned_sin = (odd & (IntVector)cos_r) | (~odd & (IntVector)sin_r);
  cos = (FloatVector)(turned_cos ^ (((quadrant + 1) & 2) << 30));
  sin = (FloatVector)(turned_sin ^ ((quadrant & 2) << 30));
}

inline void sincos(const float* angles, float* cos, float* sin, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, auto part) {
    FloatVector c, s;
    sincos(load(angles + i, part), c, s);
    store(cos + i, c, part);
    store(sin + i, s, part);
  });
  for (int64_t i = 0; i < n; ++i) {
    if (std::fabs(angles[i]) < kFarAngle) continue;  // not so: far angles, infinities, NaN
    cos[i] = std::cos(angles[i]);
    sin[i] = std::sin(angles[i]);
  }
}

inline void sincos(const double* angles, double* cos, double* sin, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    cos[i] = std::cos(angles[i]);
    sin[i] = std::sin(angles[i]);
  }
}

// ---- threads ---------------------------------------------------------------------------------------------------------
// A parallel region costs some µs: each thread gets at least this many elements, 5 to 20 µs of these kernels.
constexpr int64_t kElementsPerThread = 32768;

inline int useful_threads(int64_t elements, int threads) {
  const int64_t useful = elements / kElementsPerThread;
  return useful < 1 ? 1 : useful < threads ? int(useful) : threads;
}

// body(begin, end) over [0, count), one contiguous piece per thread. Without a parallel region for one thread: after a fork
// OpenMP's pool is gone, and a process that asks for one thread must not wait for it.
template <class Body>
inline void parallel_for(int64_t count, int threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      const int64_t begin = count / team * rank + (count % team) * rank / team;
      const int64_t end = count / team * (rank + 1) + (count % team) * (rank + 1) / team;
      if (begin < end) body(begin, end);
    }
    return;
  }
#endif
  (void)threads;
  if (count > 0) body(int64_t(0), count);
}

// ---- memory ----------------------------------------------------------------------------------------------------------
// Blocks that a thread has used and may use again: malloc gives larger ones back to the system at every free, and the page
// faults of the next call would be a tenth of a forward pass of attention.
struct BlockCache {
  static constexpr int kBlocks = 32;
  static constexpr size_t kLargest = size_t(4) << 20;
  struct Block {
    void* data;
    size_t size;
  } blocks[kBlocks] = {};

  ~BlockCache() {
    for (Block& block : blocks) std::free(block.data);
  }

  // At least `size` bytes, at most twice that.
  Block take(size_t size) {
#if defined(HDIT_SANITIZE)  // to the byte and for one use, so that AddressSanitizer sees what lies beyond
    void* data = nullptr;
    return {posix_memalign(&data, 64, size) == 0 ? data : nullptr, kLargest + 1};
#endif
    for (Block& block : blocks) {
      if (block.data == nullptr || block.size < size || block.size > 2 * size) continue;
      const Block found = block;
      block = {};
      return found;
    }
    size = (size + 63) / 64 * 64;
    return {std::aligned_alloc(64, size), size};
  }

  void give(Block used) {
    if (used.size > kLargest) return std::free(used.data);
    for (Block& block : blocks) {
      if (block.data != nullptr) continue;
      block = used;
      return;
    }
    std::free(blocks[0].data);  // the one that has waited longest
    for (int i = 1; i < kBlocks; ++i) blocks[i - 1] = blocks[i];
    blocks[kBlocks - 1] = used;
  }
};
thread_local BlockCache block_cache;

// Uninitialised scratch memory of one thread that frees itself, aligned to cache lines.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(block_cache.take(count * sizeof(T))) {
    if (block_.data == nullptr && count > 0) throw std::bad_alloc();
  }
  ~Scratch() { block_cache.give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(block_.data); }

 private:
  BlockCache::Block block_;
};

template <class T>
inline T* at(const Tokens& t, int64_t b, int64_t y, int64_t x, int64_t h) {
  return static_cast<T*>(t.data) + b * t.batch_stride + y * t.height_stride + x * t.width_stride + h * t.head_stride;
}

// body(T{}) with the element type of `dtype`.
template <class Body>
inline void with_element_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    case DType::float64:
      return body(double{});
  }
}

}  // namespace
}  // namespace hdit

#endif  // HDIT_DEVICE_CODE
