// What the two passes of the fast path share. It takes stride 1, not causal, dim and v_dim multiples of 16, no extra tokens.
//
// A strip of columns marches down the rows. Keys (turned, transposed: feature by feature, a vector holds neighbouring
// columns) and values (token by token) of the rows that it sees lie in rings of a few rows, which stay in the caches. A
// vector of queries, also transposed, times the same vector of keys shifted by dx gives the logits of that offset for all
// its lanes: no sums across lanes, no gathering. Lengths of q and k multiply the logits, not the tokens.
//
// At a border the window of a query is shifted inwards. As softmax does not care about the order of its keys, columns are
// read wrapped by the kernel instead (column −1 is column k − 1, column W is W − k): the window then has the same k offsets
// everywhere. A dilated grid is one grid for every residue class of rows and columns, with longer steps between tokens.
#pragma once

#include "neighborhood_attention.h"

#include <cmath>

#define UNROLLED _Pragma("GCC unroll 32")
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace hdit {
namespace {

constexpr int64_t kStrip = 32;   // columns of queries
constexpr int64_t kMostDim = 256;
constexpr int64_t kBoundedFactor = 40;  // |logit| up to this needs no maximum: exp(−80) is a normal number
constexpr double kLog2E = 1.44269504088896341, kLn2 = 0.693147180559945309;
constexpr int kForwardRows = 3, kBackwardRows = 3;  // rows of queries that share one pass over a row of keys
#if defined(__AVX512F__)
constexpr int kOffsets = 7;  // neighbouring offsets at a time: rows·kOffsets sums in registers, of 32 or 16
#else
constexpr int kOffsets = 4;
#endif
constexpr int64_t kRingBytes = 512 << 10;  // of keys and values that may live in the second-level cache
constexpr int kPrefetchLines = 16;  // asked for in advance for every row of a weighted sum
constexpr int kMostSums = 6;  // at a time: for_each_sums

template <int N>
struct Count {
  static constexpr int value = N;
};

// ---- geometry --------------------------------------------------------------------------------------------------------------
// One dimension of one residue class. Place i of it lies at first + i·step of the image.
struct Axis {
  int64_t length, kernel, first, step;
  Axis(const Window& w, int64_t group)
      : length((w.length - group + w.dilation - 1) / w.dilation), kernel(w.kernel), first(group), step(w.dilation) {}
  int64_t low(int64_t i) const { return larger(smaller(i - kernel / 2, length - kernel), 0); }
  int64_t image(int64_t i) const { return first + i * step; }
  int64_t wrapped(int64_t i) const {
    i = i < 0 ? i + kernel : i >= length ? i - kernel : i;
    return smaller(larger(i, 0), length - 1);  // beyond the last window: any token will do
  }
};

template <class S>
inline int64_t strips_of(const Axis& columns) {
  return (columns.length + kStrip - 1) / kStrip;
}

// The columns of one strip: nearly equal strips, the last not narrower than the others but for its last vector.
template <class S>
struct Columns {
  static constexpr int kL = kLanes<S>;
  int64_t begin, queries, groups, keys;
  Scratch<int64_t> query, key;  // image columns of the queries, and of the keys from begin − kernel/2 on

  explicit Columns(const Window& w) : query(kStrip), key(width(w)) {}

  // Columns of keys, in whole vectors: what the widest strip reads.
  static int64_t width(const Window& w) { return kStrip + (w.kernel - 1 + kL - 1) / kL * kL; }

  void place(const Axis& axis, int64_t strip) {
    const int64_t all = (axis.length + kL - 1) / kL, strips = strips_of<S>(axis);
    const int64_t first = all * strip / strips;
    groups = all * (strip + 1) / strips - first;
    begin = first * kL;
    queries = smaller(axis.length - begin, groups * kL);
    keys = queries + axis.kernel - 1;
    for (int64_t i = 0; i < groups * kL; ++i) query.get()[i] = axis.image(smaller(begin + i, axis.length - 1));
    const int64_t loaded = groups * kL + (axis.kernel - 1 + kL - 1) / kL * kL;
    for (int64_t i = 0; i < loaded; ++i) key.get()[i] = axis.image(axis.wrapped(begin - axis.kernel / 2 + i));
  }
};

// Cosines, then sines, 2r each, of every place and head; the half of the other axis is zeros, so that the row's and the
// column's table add up to the table of a token.
template <class S>
struct Turns {
  int64_t size, heads;
  Scratch<S> table;

  Turns(const void* angles, int64_t length, int64_t heads, int64_t r, int64_t half)
      : size(4 * r), heads(heads), table(length * heads * size) {
    const int64_t count = length * heads;
    Scratch<S> c(count * r), s(count * r);
    sincos(static_cast<const S*>(angles), c.get(), s.get(), count * r);
    std::memset(table.get(), 0, count * size * sizeof(S));
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(table.get() + i * size + half * r, c.get() + i * r, r * sizeof(S));
      std::memcpy(table.get() + i * size + (2 + half) * r, s.get() + i * r, r * sizeof(S));
    }
  }

  const S* at(int64_t place, int64_t head) const { return table.get() + (place * heads + head) * size; }
};

// What forward and backward know of a call before they start.
template <class S>
struct Call {
  const NeighborhoodAttention& a;
  Turns<S> row_turns, column_turns;
  Tokens out;
  int64_t width;  // columns of keys in a ring
  bool cosine;

  explicit Call(const NeighborhoodAttention& args)
      : a(args), row_turns(args.height_angles, args.rows.length, args.heads, args.angles, 0),
        column_turns(args.width_angles, args.columns.length, args.heads, args.angles, 1),
        out{args.out, args.rows.length * args.columns.length * args.heads * args.v_dim,
            args.columns.length * args.heads * args.v_dim, args.heads * args.v_dim, args.v_dim},
        width(Columns<S>::width(args.columns)), cosine(args.cosine_scale != nullptr) {}

  int64_t classes() const { return a.rows.dilation * a.columns.dilation; }
  Axis rows(int64_t c) const { return Axis(a.rows, c / a.columns.dilation); }
  Axis columns(int64_t c) const { return Axis(a.columns, c % a.columns.dilation); }
};

// What the fast path takes.
inline bool fits(const NeighborhoodAttention& a) {
  return a.rows.stride == 1 && a.columns.stride == 1 && !a.rows.causal && !a.columns.causal && a.extra == 0 &&
         a.dim % 16 == 0 && a.v_dim % 16 == 0 && a.dim <= kMostDim && a.v_dim <= kMostDim && a.v_dim > 0;
}

// ---- memory ------------------------------------------------------------------------------------------------------------------
// Memory that will be wanted soon, asked for a few lines at a time from inside the arithmetic.
struct Prefetch {
  struct Piece {
    const char* at;
    int64_t stride, lines, count;
  } pieces[24];
  int64_t pieces_left = 0, piece = 0, line = 0;

  void clear() { pieces_left = piece = line = 0; }

  void add(const void* first, int64_t stride, int64_t bytes, int64_t count) {
    if (count > 0) pieces[pieces_left++] = {static_cast<const char*>(first), stride, (bytes + 63) / 64, count};
  }

  template <int kLines>
  INLINE void some() {
    if (piece == pieces_left) return;
    const char* here = pieces[piece].at + line * 64;
    int64_t left = pieces[piece].lines - line;
    for (int i = 0; i < kLines; ++i, here += 64) {
      __builtin_prefetch(here, 0, 2);
      if (--left > 0) continue;
      Piece& p = pieces[piece];
      p.at += p.stride;
      piece += --p.count == 0;
      if (piece == pieces_left) return;
      here = pieces[piece].at - 64;
      left = pieces[piece].lines;
    }
    line = pieces[piece].lines - left;
  }
};

// Asks for columns [begin, end) of row y of `features` features, a head or several side by side.
template <class T>
inline void ask(Prefetch& prefetch, const Tokens& tokens, const Axis& rows, const Axis& axis, int64_t b, int64_t y, int64_t begin,
                int64_t end, int64_t head, int64_t features) {
  if (tokens.data == nullptr || y < 0 || y >= rows.length) return;
  const T* first = at<const T>(tokens, b, rows.image(y), axis.image(begin), head);
  prefetch.add(first, tokens.width_stride * axis.step * int64_t(sizeof(T)), features * int64_t(sizeof(T)), end - begin);
}

// Features [0, 4r) of a token turned by `row` and `column`, backwards for sign −1.
template <class T, class S>
INLINE void turn(const T* x, S* result, const S* row, const S* column, int64_t r, S sign) {
  for_each_vector<S>(2 * r, [&](int64_t i, auto part) {
    const auto c = load(row + i, part) + load(column + i, part);
    const auto s = (load(row + 2 * r + i, part) + load(column + 2 * r + i, part)) * sign;
    const auto u = load(x + i, part), w = load(x + 2 * r + i, part);
    store(result + i, u * c - w * s, part);
    store(result + 2 * r + i, w * c + u * s, part);
  });
}

// columns[i][j] = rows[j][i]
template <class S>
INLINE void transpose(const S* const* rows, int64_t offset, Vector<S> (&columns)[kLanes<S>]) {
  for (int i = 0; i < kLanes<S>; ++i)
    for (int j = 0; j < kLanes<S>; ++j) columns[i][j] = rows[j][offset + i];
}

#if defined(__AVX512F__)
INLINE __m512 join(__m512 a, __m512 b, Count<0x88>) { return _mm512_maskz_shuffle_f32x4(-1, a, b, 0x88); }
INLINE __m512 join(__m512 a, __m512 b, Count<0xdd>) { return _mm512_maskz_shuffle_f32x4(-1, a, b, 0xdd); }

INLINE void transpose(const float* const* rows, int64_t offset, FloatVector (&columns)[16]) {
  __m512 a[16], b[16];
  UNROLLED for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows[i] + offset);
  UNROLLED for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_ps(-1, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_ps(-1, a[i], a[i + 1]);
  }
  UNROLLED for (int i = 0; i < 16; i += 4) {
    UNROLLED for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = (__m512)_mm512_maskz_unpacklo_pd(-1, (__m512d)b[i + j], (__m512d)b[i + 2 + j]);
      a[i + 2 * j + 1] = (__m512)_mm512_maskz_unpackhi_pd(-1, (__m512d)b[i + j], (__m512d)b[i + 2 + j]);
    }
  }
  // The m-th quarter of a[4g + j] now holds feature 4m + j of rows 4g to 4g + 3.
  UNROLLED for (int j = 0; j < 4; ++j) {
    const __m512 even0 = join(a[j], a[4 + j], Count<0x88>{}), even1 = join(a[8 + j], a[12 + j], Count<0x88>{});
    const __m512 odd0 = join(a[j], a[4 + j], Count<0xdd>{}), odd1 = join(a[8 + j], a[12 + j], Count<0xdd>{});
    columns[j] = (FloatVector)join(even0, even1, Count<0x88>{});
    columns[8 + j] = (FloatVector)join(even0, even1, Count<0xdd>{});
    columns[4 + j] = (FloatVector)join(odd0, odd1, Count<0x88>{});
    columns[12 + j] = (FloatVector)join(odd0, odd1, Count<0xdd>{});
  }
}
#elif defined(__AVX2__)
INLINE void transpose(const float* const* rows, int64_t offset, FloatVector (&columns)[8]) {
  __m256 a[8], b[8];
  UNROLLED for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows[i] + offset);
  UNROLLED for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  UNROLLED for (int i = 0; i < 8; i += 4) {
    UNROLLED for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = (__m256)_mm256_unpacklo_pd((__m256d)b[i + j], (__m256d)b[i + 2 + j]);
      a[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd((__m256d)b[i + j], (__m256d)b[i + 2 + j]);
    }
  }
  UNROLLED for (int j = 0; j < 4; ++j) {
    columns[j] = (FloatVector)_mm256_permute2f128_ps(a[j], a[4 + j], 0x20);
    columns[4 + j] = (FloatVector)_mm256_permute2f128_ps(a[j], a[4 + j], 0x31);
  }
}
#endif

// Features [begin, end) of kLanes tokens, feature by feature, `width` apart. Adds their squares to `squares`.
template <class S>
INLINE void transpose_tokens(const S* const* tokens, int64_t begin, int64_t end, S* target, int64_t width, Vector<S>& squares) {
  for (int64_t d = begin; d < end; d += kLanes<S>) {
    Vector<S> columns[kLanes<S>], part = {};  // one sum of all features would lose more digits
    transpose(tokens, d, columns);
    UNROLLED for (int i = 0; i < kLanes<S>; ++i) {
      part += columns[i] * columns[i];
      store(target + (d + i) * width, columns[i], Full{});
    }
    squares += part;
  }
}

template <class T>
INLINE void copy_token(const T* x, Scalar<T>* result, int64_t dim) {
  for (int64_t d = 0; d < dim; d += kLanes<T>) store(result + d, load(x + d, Full{}), Full{});
}

template <class S>
INLINE S dot_tokens(const S* x, const S* y, int64_t dim) {
  Vector<S> sum = {};
  for (int64_t d = 0; d < dim; d += kLanes<S>) sum += load(x + d, Full{}) * load(y + d, Full{});
  return sum_lanes(sum);
}

INLINE FloatVector square_root(FloatVector x) {
#if defined(__AVX512F__)
  return (FloatVector)_mm512_maskz_sqrt_ps(-1, (__m512)x);
#elif defined(__AVX2__)
  return (FloatVector)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

INLINE DoubleVector square_root(DoubleVector x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Reads tokens of one image: prepared keys and queries, and plain values.
template <class T>
struct Reader {
  using S = Scalar<T>;
  static constexpr int kL = kLanes<T>;
  const Call<S>& call;
  const NeighborhoodAttention& a;
  Scratch<T> zeros;  // what a hidden token is taken for
  Scratch<S> staging, transposed;

  explicit Reader(const Call<S>& c)
      : call(c), a(c.a), zeros(kMostDim), staging(kL * kMostDim), transposed(kL * kMostDim) {
    std::memset(zeros.get(), 0, kMostDim * sizeof(T));
  }

  // A key or a value of image row y, column x.
  INLINE const T* key(const Tokens& tokens, int64_t b, int64_t y, int64_t x, int64_t head) const {
    return visible(b, y, x) ? at<const T>(tokens, b, y, x, head) : zeros.get();
  }

  bool visible(int64_t b, int64_t y, int64_t x) const {
    return a.key_mask == nullptr || a.key_mask[(b * a.rows.length + y) * a.columns.length + x];
  }

  // kL queries or keys of one head and image row y, turned and transposed to `target`. Returns 1 / length, 1 without cosine
  // similarity. kKeep: they are wanted token by token too, in `tokens`, which is else scratch.
  template <bool kKeep>
  INLINE Vector<S> prepare(const T* const* raw, int64_t y, const int64_t* columns, int64_t head, S* tokens, S* target,
                           int64_t width) const {
    const S* turned[kL];
    const S* plain[kL];
    for (int i = 0; i < kL; ++i) plain[i] = turned[i] = tokens + i * a.dim;
    const int64_t turns = 4 * a.angles;
    int64_t split = a.dim;  // features from here on are transposed from where they are
    if constexpr (!kKeep && sizeof(T) == sizeof(S)) {
      if (turns % kL == 0) {
        split = turns;
        for (int i = 0; i < kL; ++i) plain[i] = raw[i];
      }
    }
    for (int i = 0; i < kL; ++i) {
      S* token = tokens + i * a.dim;
      turn(raw[i], token, call.row_turns.at(y, head), call.column_turns.at(columns[i], head), a.angles, S(1));
      for_each_vector<T>(split - turns, [&](int64_t d, auto part) { store(token + turns + d, load(raw[i] + turns + d, part), part); });
    }
    Vector<S> squares = {};
    transpose_tokens(turned, 0, split, target, width, squares);
    transpose_tokens(plain, split, a.dim, target, width, squares);
    return call.cosine ? S(1) / square_root(squares + S(kEps)) : Vector<S>{} + S(1);
  }

  // kL values or gradients of outputs, transposed to `target`.
  INLINE void transpose_plain(const T* const* raw, int64_t dim, S* target, int64_t width) const {
    const S* rows[kL];
    for (int i = 0; i < kL; ++i) {
      if constexpr (sizeof(T) == sizeof(S)) {
        rows[i] = raw[i];
      } else {
        copy_token(raw[i], staging.get() + i * dim, dim);
        rows[i] = staging.get() + i * dim;
      }
    }
    Vector<S> squares = {};
    transpose_tokens(rows, 0, dim, target, width, squares);
  }
};

// ---- what rings hold -----------------------------------------------------------------------------------------------------------
// Numbers to compute with or, where the CPU multiplies them, pairs of bfloat16: neighbouring features of q and k, neighbouring
// rows of weights and values. A pair times a pair adds two products.
struct Pair {
  uint32_t bits;
};
template <class T>
struct RingOf {
  using Element = Scalar<T>;
};
#if defined(__AVX512BF16__)
template <>
struct RingOf<BFloat16> {
  using Element = Pair;
};
#endif
template <class E>
struct SumOf {
  using Type = E;
};
template <>
struct SumOf<Pair> {
  using Type = float;
};
template <class E>
using Sum = typename SumOf<E>::Type;
template <class E>
constexpr int kPerElement = 1;
template <>
constexpr int kPerElement<Pair> = 2;

template <class S>
INLINE Vector<S> splat(const S* x) {
  return *x - Vector<S>{};  // (0 + x would be an addition, since it is not x for x = −0)
}

template <class V>
INLINE V multiply_add(V sum, V a, V b) {
  return sum + a * b;
}

#if defined(__AVX512BF16__)
INLINE UintVector load(const Pair* p, Full) {
  UintVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE void store(Pair* p, UintVector v) { std::memcpy(p, &v, sizeof v); }

INLINE UintVector splat(const Pair* x) { return x->bits + UintVector{}; }

INLINE FloatVector multiply_add(FloatVector sum, UintVector a, UintVector b) {
  return (FloatVector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

INLINE UintVector rounded(FloatVector x) {
  return (UintVector)_mm512_maskz_cvtepu16_epi32(-1, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

// ---- arithmetic --------------------------------------------------------------------------------------------------------------
// sums[j][i] = Σ_d queries[j][d]·keys[d] shifted by i columns
template <class E, int R, int C>
INLINE void products(const E* const* queries, const E* keys, int64_t width, int64_t dim, Vector<Sum<E>> (&sums)[R][C]) {
  UNROLLED for (int j = 0; j < R; ++j) UNROLLED for (int i = 0; i < C; ++i) sums[j][i] = Vector<Sum<E>>{};
  const E* rows[R];
  UNROLLED for (int j = 0; j < R; ++j) rows[j] = queries[j];
#pragma GCC unroll 2
  for (int64_t d = 0; d < dim; ++d) {
    decltype(load(keys, Full{})) query[R];
    UNROLLED for (int j = 0; j < R; ++j) query[j] = load(rows[j] + d * kStrip, Full{});
    UNROLLED for (int i = 0; i < C; ++i) {
      const auto key = load(keys + i, Full{});
      UNROLLED for (int j = 0; j < R; ++j) sums[j][i] = multiply_add(sums[j][i], query[j], key);
    }
    keys += width;
  }
}

// The same, every 16 features summed apart: one chain of all features loses twice as many digits, which shows in the gradient
// of cosine_scale, where large terms of both signs all but cancel.
template <class S, int R, int C>
INLINE void products_in_parts(const S* const* queries, const S* keys, int64_t width, int64_t dim, Vector<S> (&sums)[R][C]) {
  constexpr int64_t kPart = 16;
  products<S, R, C>(queries, keys, width, kPart, sums);
  for (int64_t d = kPart; d < dim; d += kPart) {
    const S* rows[R];
    UNROLLED for (int j = 0; j < R; ++j) rows[j] = queries[j] + d * kStrip;
    Vector<S> part[R][C];
    products<S, R, C>(rows, keys + d * width, width, kPart, part);
    UNROLLED for (int j = 0; j < R; ++j) UNROLLED for (int i = 0; i < C; ++i) sums[j][i] += part[j][i];
  }
}

// body(Count<C>, first) over the offsets of a window, at most kOffsets at a time.
template <class Body>
INLINE void for_each_offsets(int64_t kernel, Body body) {
  const int64_t pieces = (kernel + kOffsets - 1) / kOffsets, most = (kernel + pieces - 1) / pieces;
  for (int64_t first = 0; first < kernel; first += most) {
    switch (smaller(most, kernel - first)) {
#if defined(__AVX512F__)
      case 7: body(Count<7>{}, first); break;
      case 6: body(Count<6>{}, first); break;
      case 5: body(Count<5>{}, first); break;
#endif
      case 4: body(Count<4>{}, first); break;
      case 3: body(Count<3>{}, first); break;
      case 2: body(Count<2>{}, first); break;
      case 1: body(Count<1>{}, first); break;
    }
  }
}

// How weights lie: that of token t in sum i is at t·kToken + i·kSum.
struct ByQuery {  // sums over the keys of queries i; token t is the key i + offset
  static constexpr int64_t kToken = kStrip, kSum = 1 - kStrip;
};
struct ByKey {  // sums over the queries of keys i; token t is the query of column t − (kernel − 1), so its offset falls with t
  static constexpr int64_t kToken = 1 - kStrip, kSum = kStrip;
};

// sums[i] = Σ over rows m and tokens t, i <= t < i + kernel, of weight·tokens[m][t], for Q sums and F vectors of features;
// only tokens of [begin, end) exist. Then body(i, f, sum).
template <class Weights, int Q, int F, bool kAll, class E, class Body>
INLINE void weighted_sums(const E* const* weights, int64_t weight, const E* const* tokens, int64_t token, int64_t rows,
                          int64_t kernel, int64_t begin, int64_t end, int64_t dim, Prefetch& prefetch, Body body) {
  constexpr int kL = kLanes<Sum<E>>;
  Vector<Sum<E>> sums[Q][F];
  UNROLLED for (int i = 0; i < Q; ++i) UNROLLED for (int f = 0; f < F; ++f) sums[i][f] = Vector<Sum<E>>{};
  for (int64_t m = 0; m < rows; ++m) {
    const E *w = weights[m] + weight, *x = tokens[m] + token;
    const auto add = [&](int64_t t, int first, int last) INLINED {
      if (kAll || (t >= begin && t < end)) {
        decltype(load(x, Full{})) features[F];
        UNROLLED for (int f = 0; f < F; ++f) features[f] = load(x + f * kL, Full{});
        UNROLLED for (int i = 0; i < Q; ++i) {
          if (i < first || i > last) continue;
          const auto factor = splat(w + i * Weights::kSum);
          UNROLLED for (int f = 0; f < F; ++f) sums[i][f] = multiply_add(sums[i][f], factor, features[f]);
        }
      }
      w += Weights::kToken, x += dim;
    };
    prefetch.some<kPrefetchLines>();
    UNROLLED for (int t = 0; t < Q; ++t) {
      // The next sums begin with Q tokens that these do not see.
      UNROLLED for (int f = 0; f < F * kL; f += 64 / int(sizeof(E))) __builtin_prefetch(x + (Q + kernel - 1) * dim + f, 0, 3);
      add(t, 0, t);
    }
    for (int64_t t = Q; t < kernel; ++t) add(t, 0, Q - 1);
    UNROLLED for (int t = 1; t < Q; ++t) add(kernel - 1 + t, t, Q - 1);
  }
  UNROLLED for (int i = 0; i < Q; ++i) UNROLLED for (int f = 0; f < F; ++f) body(i, f * kL, sums[i][f]);
}

// The same over all features.
template <class Weights, int Q, bool kAll, class E, class Body>
__attribute__((noinline)) void all_weighted_sums(const E* const* weights, int64_t weight, const E* const* tokens, int64_t token,
                                                 int64_t rows, int64_t kernel, int64_t begin, int64_t end, int64_t dim,
                                                 Prefetch& prefetch, Body body) {
  constexpr int kL = kLanes<Sum<E>>;
  constexpr int kMost = kVectorBytes == 64 ? 4 : 2;  // Q·kMost sums in registers, of 32 or 16
  const auto some = [&](auto vectors, int64_t d) INLINED {
    weighted_sums<Weights, Q, decltype(vectors)::value, kAll>(
        weights, weight, tokens, token * dim + d, rows, kernel, begin, end, dim, prefetch,
        [&](int i, int f, auto sum) INLINED { body(i, d + f, sum); });
  };
  int64_t d = 0;
  for (; d + kMost * kL <= dim; d += kMost * kL) some(Count<kMost>{}, d);
  if constexpr (kMost * kL > 16)  // dim is a multiple of 16
    for (; d < dim; d += 16) some(Count<16 / kL>{}, d);
}

// body(Count<Q>, first) over [0, count): as many sums at a time as the window allows, and no small rest where two pieces do.
template <class Body>
INLINE void for_each_sums(int64_t count, int64_t kernel, Body body) {
  for (int64_t i = 0; i < count;) {
    const int64_t left = count - i;
    if (left >= 6 && left != 8 && kernel >= 6) body(Count<6>{}, i), i += 6;
    else if (left >= 4 && kernel >= 4) body(Count<4>{}, i), i += 4;
    else if (left >= 2 && kernel >= 2) body(Count<2>{}, i), i += 2;
    else body(Count<1>{}, i), i += 1;
  }
}

}  // namespace
}  // namespace hdit
