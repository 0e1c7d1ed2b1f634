// What the two CUDA passes of the fast path share: strips_forward_cuda.cu, strips_backward_cuda.cu.
//
// A block owns a strip of columns and marches down the rows; rows of tokens that it needs lie in rings in shared memory.
//
// How a token lies in lanes. Four neighbouring lanes share a head of `dim` features. With r = dim / 8, axial RoPE turns
// the pairs (i, i + 2r), i < 2r, and leaves the rest. Lane t holds the first features r/2·t … of pairs, their second
// features 2r + r/2·t …, and a quarter of the rest: pairs stay in one lane, a sum over the head takes two shuffles. Taken
// two features to a word, words 2j and 2j + 1 of the four lanes are a fragment of 16 features for mma.sync, in an order
// of the features that q and k have in common, which a dot product does not mind.
//
// How it lies in shared memory. In chunks of 16 bytes, chunk c at place c ^ swizzle(column): the accesses below, ldmatrix
// of 8 neighbouring columns included, then meet no bank twice. Raw, the chunks are the token's own. Prepared (normalised
// and rotated), word c of lane t is word t of chunk c, so that what a fragment of ldmatrix gives lane t is its own.
//
// Borders. A softmax does not care about the order of its keys, so the window that is shifted inward at a border equals
// the plain one over rows and columns `wrapped` by its length: row −1 is row window − 1, row n is row n − window. For a
// key, the queries that see it are contiguous: `first_query` … `last_query`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core.cuh"
#include "neighborhood_attention.h"

namespace hdit {
namespace strips {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLengthEpsilon = 1e-6f;  // in the lengths of q and k, as in the reference
constexpr int kTileColumns = 8;          // of a tile of 2 rows x 8 columns: the 16 rows of an mma
constexpr int kMostWindow = 9;           // a tile sees 8 + window − 1 <= 16 columns

// ---- what a kernel is given ------------------------------------------------------------------------------------------
// A (batch, height, width, heads, dim) tensor, strides in bytes.
struct Tensor {
  char* data;
  int64_t batch_stride, height_stride, head_stride;
  int width_stride;
};

struct Args {
  Tensor q, k, v;
  const float* cosine_scale;   // (heads,), or null: plain dot products
  const float* height_angles;  // (height, heads, dim / 8), or null: no rotation
  const float* width_angles;   // (width, heads, dim / 8)
  void* out;                   // (batch, height, width, heads, dim) contiguous
  float* lse;                  // (batch, height, width, heads) contiguous
  float scale;
  int height, width, heads;
  int window_rows, window_columns;
  int rows, strips, segments;  // a block: `rows` rows of a strip; strips across, segments down
};

// Which strip of which head a block owns: neighbours in memory run at the same time.
struct Place {
  int strip, segment, head, image;
};

DEVICE Place place_of(int block, const Args& args) {
  Place place;
  place.strip = block % args.strips;
  block /= args.strips;
  place.segment = block % args.segments;
  block /= args.segments;
  place.head = block % args.heads;
  place.image = block / args.heads;
  return place;
}

// Head `head` of the token at row 0, column 0 of an image.
DEVICE char* image_of(const Tensor& x, const Place& place) {
  return x.data + place.image * x.batch_stride + place.head * x.head_stride;
}

// ---- which calls are taken -------------------------------------------------------------------------------------------
// Every token's head aligned to 16 bytes; an offset within 32 rows in 31 bits.
inline bool takes(const Tokens& x, const NeighborhoodAttention& a) {
  const int64_t height_bytes = 2 * x.height_stride, width_bytes = 2 * x.width_stride;
  const uint64_t bits = reinterpret_cast<uintptr_t>(x.data) | uint64_t(2 * x.batch_stride) | uint64_t(height_bytes) |
                        uint64_t(width_bytes) | uint64_t(2 * x.head_stride);
  return bits % 16 == 0 && height_bytes >= 0 && width_bytes >= 0 && height_bytes < (int64_t(1) << 25) &&
         width_bytes * a.columns.length < (int64_t(1) << 30);
}

inline bool takes(const Window& w) {
  return w.stride == 1 && w.dilation == 1 && !w.causal && w.kernel >= 2 && w.kernel <= kMostWindow && w.length < (1 << 30);
}

inline bool takes(const NeighborhoodAttention& a) {
  return (a.dtype == DType::bfloat16 || a.dtype == DType::float16) && a.dim == a.v_dim && a.extra == 0 &&
         a.key_mask == nullptr && a.columns.length * a.heads * a.dim < (int64_t(1) << 30) && takes(a.rows) &&
         takes(a.columns) && takes(a.q, a) && takes(a.k, a) && takes(a.v, a) &&
         (a.height_angles == nullptr || a.angles == 0 || a.angles * 8 == a.dim);
}

inline Tensor in_bytes(const Tokens& x) {
  return {static_cast<char*>(x.data), 2 * x.batch_stride, 2 * x.height_stride, 2 * x.head_stride, int(2 * x.width_stride)};
}

// `columns` of a strip; a segment's rows are a multiple of `step`, and at most `rows`.
inline Args args_of(const NeighborhoodAttention& a, int strip_columns, int rows) {
  Args args = {};
  args.q = in_bytes(a.q), args.k = in_bytes(a.k), args.v = in_bytes(a.v);
  args.cosine_scale = static_cast<const float*>(a.cosine_scale);
  if (a.angles > 0) {
    args.height_angles = static_cast<const float*>(a.height_angles);
    args.width_angles = static_cast<const float*>(a.width_angles);
  }
  args.out = a.out, args.lse = static_cast<float*>(a.lse);
  args.scale = float(a.scale);
  args.height = int(a.rows.length), args.width = int(a.columns.length), args.heads = int(a.heads);
  args.window_rows = int(a.rows.kernel), args.window_columns = int(a.columns.kernel);
  args.rows = rows;
  args.strips = (args.width + strip_columns - 1) / strip_columns;
  args.segments = (args.height + rows - 1) / rows;
  return args;
}

// Rows of a segment, whole steps: those whose waves of `at_once` blocks take least. A block costs `more` rows beyond its
// own: it begins with rows that its neighbour has too.
inline int segment_rows(int height, int64_t strips, int64_t at_once, int step, int more, int most_rows) {
  int best = step;
  int64_t least_time = INT64_MAX;
  const int first = (height + most_rows - 1) / most_rows;
  for (int segments = first; segments < first + 64; ++segments) {
    const int rows = int(ceil_div(ceil_div(height, segments), step)) * step;
    const int64_t time = ceil_div(strips * ceil_div(height, rows), at_once) * (rows + more);
    if (time < least_time) least_time = time, best = rows;
  }
  return best;
}

// ---- borders ---------------------------------------------------------------------------------------------------------
#if defined(__CUDACC__)
#define BOTH __host__ __device__ __forceinline__  // the host cuts the grid by the same rules
#else
#define BOTH inline
#endif
BOTH int least(int a, int b) { return a < b ? a : b; }
BOTH int most(int a, int b) { return a > b ? a : b; }

// The row (column) that stands at place i of the unshifted window; beyond what any window sees, some row that exists.
DEVICE int wrapped(int i, int length, int window) {
  i = i < 0 ? i + window : i >= length ? i - window : i;
  return most(0, least(i, length - 1));
}

// The queries whose window holds key i, along one axis.
BOTH int first_query(int i, int window) { return i < window ? 0 : i - (window - 1 - window / 2); }
BOTH int last_query(int i, int length, int window) { return i >= length - window ? length - 1 : i + window / 2; }

// ---- elements --------------------------------------------------------------------------------------------------------
// Two 16-bit elements in a word.
template <class T>
DEVICE float low(uint32_t pair);
template <class T>
DEVICE float high(uint32_t pair);
template <class T>
DEVICE uint32_t pack(float low, float high);
template <>
DEVICE float low<BFloat16>(uint32_t pair) { return core::bf16_low(pair); }
template <>
DEVICE float high<BFloat16>(uint32_t pair) { return core::bf16_high(pair); }
template <>
DEVICE uint32_t pack<BFloat16>(float low, float high) { return core::pack_bf16(low, high); }
template <>
DEVICE float low<Float16>(uint32_t pair) { return core::f16_low(pair); }
template <>
DEVICE float high<Float16>(uint32_t pair) { return core::f16_high(pair); }
template <>
DEVICE uint32_t pack<Float16>(float low, float high) { return core::pack_f16(low, high); }

template <class T>
constexpr uint32_t kOnes = 0;  // a pair of ones
template <>
constexpr uint32_t kOnes<BFloat16> = 0x3f803f80;
template <>
constexpr uint32_t kOnes<Float16> = 0x3c003c00;

// sums = start + a·b, or sums += a·b, for a: 16 x 16, b: 16 x 8.
template <class T>
DEVICE void multiply(float (&sums)[4], const float (&start)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) core::mma_bf16(sums, start, a[0], a[1], a[2], a[3], b0, b1);
  else core::mma_f16(sums, start, a[0], a[1], a[2], a[3], b0, b1);
}
template <class T>
DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) core::mma_bf16(sums, a[0], a[1], a[2], a[3], b0, b1);
  else core::mma_f16(sums, a[0], a[1], a[2], a[3], b0, b1);
}

// Cosines and sines lie in shared memory as pairs of float16, as finely rounded as the unit heads that they turn.
// Prepared q and k: float16 where they have length 1, which is 8 times finer than bfloat16 and as quick to multiply.
template <class T, bool cosine>
using Held = std::conditional_t<cosine, Float16, T>;

// ---- a token in lanes ------------------------------------------------------------------------------------------------
// Lane t's quarter of a head, two features to a word: first features of pairs, second features, the rest.
template <int dim>
struct Quarter {
  static constexpr int kWords = dim / 8, kPairWords = dim / 32;
  uint32_t word[kWords];
};

// Of a token's 16-byte chunks: the low bits of the column, reversed, so that also narrower accesses spread.
template <int dim>
DEVICE int swizzle(int column) {
  if constexpr (dim == 32) return (column >> 1 & 1) << 1 | (column >> 2 & 1);
  else return (column & 1) << 2 | (column & 2) | (column >> 2 & 1);
}

// Where lane t's quarter lies in a raw token: bytes of the piece that begins with word 0, kPairWords, 2·kPairWords (and
// of heads of 128, whose rest is two chunks a lane, 3·kPairWords).
template <int dim>
DEVICE Quarter<dim> load_quarter(const char* token, int t) {
  static_assert(dim == 32 || dim == 64 || dim == 128);
  if constexpr (dim == 32) {
    const uint2 rest = core::load_global<uint2>(token + 32 + 8 * t);
    return {{core::load_global<uint32_t>(token + 4 * t), core::load_global<uint32_t>(token + 16 + 4 * t), rest.x, rest.y}};
  } else if constexpr (dim == 64) {
    const uint2 a = core::load_global<uint2>(token + 8 * t), b = core::load_global<uint2>(token + 32 + 8 * t);
    const uint4 c = core::load_global<uint4>(token + 64 + 16 * t);
    return {{a.x, a.y, b.x, b.y, c.x, c.y, c.z, c.w}};
  } else {
    Quarter<dim> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 c = core::load_global<uint4>(token + 64 * i + 16 * t);
      x.word[4 * i] = c.x, x.word[4 * i + 1] = c.y, x.word[4 * i + 2] = c.z, x.word[4 * i + 3] = c.w;
    }
    return x;
  }
}

template <int dim>
DEVICE void store_quarter(char* token, int t, const Quarter<dim>& x) {
  const auto& w = x.word;
  if constexpr (dim == 32) {
    core::store_global<uint32_t>(token + 4 * t, w[0]);
    core::store_global<uint32_t>(token + 16 + 4 * t, w[1]);
    core::store_global<uint2>(token + 32 + 8 * t, uint2{w[2], w[3]});
  } else if constexpr (dim == 64) {
    core::store_global<uint2>(token + 8 * t, uint2{w[0], w[1]});
    core::store_global<uint2>(token + 32 + 8 * t, uint2{w[2], w[3]});
    core::store_global<uint4>(token + 64 + 16 * t, uint4{w[4], w[5], w[6], w[7]});
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      core::store_global<uint4>(token + 64 * i + 16 * t, uint4{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]});
  }
}

// The same of a raw token in shared memory. `at`: the address of its place 0, plus 16·swizzle(column): place addresses are
// then at ^ 16·chunk, as tokens are aligned to their size.
template <int dim>
DEVICE Quarter<dim> load_quarter_shared(uint32_t at, int t) {
  if constexpr (dim == 32) {
    const uint2 rest = core::load_shared<uint2>((at ^ (2 + (t >> 1)) << 4) + (t & 1) * 8);
    return {{core::load_shared<uint32_t>(at + 4 * t), core::load_shared<uint32_t>((at ^ 16) + 4 * t), rest.x, rest.y}};
  } else if constexpr (dim == 64) {
    const uint32_t first = (at ^ (t & 2) << 3) + (t & 1) * 8;
    const uint2 a = core::load_shared<uint2>(first), b = core::load_shared<uint2>(first ^ 32);
    const uint4 c = core::load_shared<uint4>(at ^ (4 + t) << 4);
    return {{a.x, a.y, b.x, b.y, c.x, c.y, c.z, c.w}};
  } else {
    Quarter<dim> x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 c = core::load_shared<uint4>(at ^ (4 * i + t) << 4);
      x.word[4 * i] = c.x, x.word[4 * i + 1] = c.y, x.word[4 * i + 2] = c.z, x.word[4 * i + 3] = c.w;
    }
    return x;
  }
}

// A prepared token: word c of lane t is word t of chunk c.
template <int dim>
DEVICE void store_prepared(uint32_t at, int t, const Quarter<dim>& x) {
#pragma unroll
  for (int c = 0; c < Quarter<dim>::kWords; ++c) core::store_shared<uint32_t>((at ^ c << 4) + 4 * t, x.word[c]);
}

// ---- normalising and rotating ----------------------------------------------------------------------------------------
// Cosines and sines of `rows` rows from first_row and `columns` columns from first_column, wrapped; dim / 2 bytes each.
// rest_at: how far behind a table what its rounding left over is stored, or 0: nowhere.
template <int dim>
DEVICE void store_angles(const Args& args, int head, uint32_t row_table, int first_row, int rows, uint32_t column_table,
                         int first_column, int columns, int thread, int threads, int rest_at = 0) {
  constexpr int kAngles = dim / 8;
#pragma unroll 1
  for (int i = thread; i < (rows + columns) * kAngles; i += threads) {
    const int place = i / kAngles, angle = i % kAngles;
    const bool is_row = place < rows;
    float turned = 0;
    if (args.height_angles != nullptr) {
      const int64_t token = is_row ? wrapped(first_row + place, args.height, args.window_rows)
                                   : wrapped(first_column + place - rows, args.width, args.window_columns);
      const int64_t at = (token * args.heads + head) * kAngles + angle;
      const float full = core::load_global<float>((is_row ? args.height_angles : args.width_angles) + at);
      const float turns = rintf(full * 0.15915494309f);  // 2π in two parts: the first product is exact in the fma
      turned = fmaf(turns, 1.7484555e-7f, fmaf(turns, -6.28318548202514648f, full));
    }
    const uint32_t table = is_row ? row_table + place * (dim / 2) : column_table + (place - rows) * (dim / 2);
    const float cosine = core::cos_fast(turned), sine = core::sin_fast(turned);
    const uint32_t pair = core::pack_f16(cosine, sine);
    core::store_shared<uint32_t>(table + angle * 4, pair);
    if (rest_at != 0) {
      const uint32_t rest = core::pack_f16(cosine - core::f16_low(pair), sine - core::f16_high(pair));
      core::store_shared<uint32_t>(table + rest_at + angle * 4, rest);
    }
  }
}

// Where lane t's part of these tables begins: lanes 0 and 1 turn by the row, 2 and 3 by the column.
template <int dim>
DEVICE uint32_t angles_of(uint32_t row_table, int row, uint32_t column_table, int column, int t) {
  return (t < 2 ? row_table + row * (dim / 2) : column_table + column * (dim / 2)) + (t & 1) * (dim / 4);
}

template <int dim>
struct Angles {
  float cosine[dim / 16], sine[dim / 16];
};

template <int dim>
DEVICE Angles<dim> load_angles(uint32_t at) {
  uint32_t pairs[dim / 16];
  if constexpr (dim == 32) {
    const uint2 c = core::load_shared<uint2>(at);
    pairs[0] = c.x, pairs[1] = c.y;
  } else {
#pragma unroll
    for (int i = 0; i < dim / 64; ++i) {
      const uint4 c = core::load_shared<uint4>(at + 16 * i);
      pairs[4 * i] = c.x, pairs[4 * i + 1] = c.y, pairs[4 * i + 2] = c.z, pairs[4 * i + 3] = c.w;
    }
  }
  Angles<dim> angles;
#pragma unroll
  for (int i = 0; i < dim / 16; ++i) angles.cosine[i] = core::f16_low(pairs[i]), angles.sine[i] = core::f16_high(pairs[i]);
  return angles;
}

// With what their rounding left over.
template <int dim>
DEVICE Angles<dim> load_angles(uint32_t at, int rest_at) {
  Angles<dim> angles = load_angles<dim>(at);
  const Angles<dim> rest = load_angles<dim>(at + rest_at);
#pragma unroll
  for (int i = 0; i < dim / 16; ++i) angles.cosine[i] += rest.cosine[i], angles.sine[i] += rest.sine[i];
  return angles;
}

// The sum of x over the four lanes of a token.
DEVICE float sum_of_token(float x) {
  x += core::shuffle_xor(x, 1);
  return x + core::shuffle_xor(x, 2);
}

template <int dim, class T>
DEVICE void unpack(float (&f)[dim / 4], const Quarter<dim>& x) {
#pragma unroll
  for (int i = 0; i < dim / 8; ++i) f[2 * i] = low<T>(x.word[i]), f[2 * i + 1] = high<T>(x.word[i]);
}

template <int dim, class T>
DEVICE Quarter<dim> packed(const float (&f)[dim / 4]) {
  Quarter<dim> x;
#pragma unroll
  for (int i = 0; i < dim / 8; ++i) x.word[i] = pack<T>(f[2 * i], f[2 * i + 1]);
  return x;
}

// factor · (the token, of length 1 if cosine), rotated. The four lanes of a token call together, with all of their warp.
// inverse_length: 1 / the token's length, or 1.
template <int dim, class T, bool cosine>
DEVICE void prepare(float (&f)[dim / 4], const Quarter<dim>& raw, const Angles<dim>& angles, float factor,
                    float& inverse_length) {
  constexpr int kPairs = dim / 16;
  unpack<dim, T>(f, raw);
  inverse_length = 1;
  if constexpr (cosine) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < dim / 4; ++i) sum = fmaf(f[i], f[i], sum);
    inverse_length = core::rsqrt(sum_of_token(sum) + kLengthEpsilon);
  }
  const float scale = factor * inverse_length;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float c = angles.cosine[i] * scale, s = angles.sine[i] * scale, first = f[i], second = f[kPairs + i];
    f[i] = first * c - second * s;
    f[kPairs + i] = second * c + first * s;
  }
#pragma unroll
  for (int i = 2 * kPairs; i < dim / 4; ++i) f[i] *= scale;
}

// The same, rounded. (The token comes and goes by value: rounding it in place costs moves.)
template <int dim, class T, bool cosine>
DEVICE Quarter<dim> prepared(const Quarter<dim>& raw, const Angles<dim>& angles, float factor, float& inverse_length) {
  float f[dim / 4];
  prepare<dim, T, cosine>(f, raw, angles, factor, inverse_length);
  return packed<dim, Held<T, cosine>>(f);
}

// What rounding f to float16, to x, left over.
template <int dim>
DEVICE Quarter<dim> left_over(const float (&f)[dim / 4], const Quarter<dim>& x) {
  float rounded[dim / 4], rest[dim / 4];
  unpack<dim, Float16>(rounded, x);
#pragma unroll
  for (int i = 0; i < dim / 4; ++i) rest[i] = f[i] - rounded[i];
  return packed<dim, Float16>(rest);
}

}  // namespace strips
}  // namespace hdit
