// The fast path of neighborhood attention: stride 1, not causal, dim and v_dim multiples of 16, no extra tokens.
//
// A strip of columns marches down the rows. Keys (turned, transposed: feature by feature, a vector holds neighbouring
// columns) and values (token by token) of the rows that it sees lie in rings of a few rows, which stay in the caches. A
// vector of queries, also transposed, times the same vector of keys shifted by dx gives the logits of that offset for all
// its lanes: no sums across lanes, no gathering. Lengths of q and k multiply the logits, not the tokens.
//
// At a border the window of a query is shifted inwards. As softmax does not care about the order of its keys, columns are
// read wrapped by the kernel instead (column −1 is column k − 1, column W is W − k): the window then has the same k offsets
// everywhere. A dilated grid is one grid for every residue class of rows and columns, with longer steps between tokens.
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
#if defined(__AVX512F__)
constexpr int kForwardRows = 2;  // rows of queries that share one pass over a row of keys
constexpr int kOffsets = 7;      // neighbouring offsets at a time: kForwardRows·kOffsets sums in registers
#else
constexpr int kForwardRows = 3;
constexpr int kOffsets = 4;
#endif
constexpr int64_t kRingBytes = 512 << 10;  // of keys and values that may live in the second-level cache
constexpr int kBackwardRows = 3;
constexpr int kPrefetchLines = 16;  // asked for in advance for every row of a weighted sum
constexpr int kSums = 6;  // sums at a time, of values by weights

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
constexpr int64_t kGroups = kStrip / kLanes<S>;  // vectors of queries in a strip

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
    const S* angle = static_cast<const S*>(angles);
    const int64_t count = length * heads;
    Scratch<S> c(count * r), s(count * r);
    for (int64_t i = 0; i < count * r; ++i) c.get()[i] = std::cos(angle[i]), s.get()[i] = std::sin(angle[i]);
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
    for (int i = 0; i < kLines; ++i) {
      if (piece == pieces_left) return;
      Piece& p = pieces[piece];
      __builtin_prefetch(p.at + line * 64, 0, 2);
      if (++line == p.lines) {
        line = 0;
        p.at += p.stride;
        piece += --p.count == 0;
      }
    }
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
    Vector<S> columns[kLanes<S>];
    transpose(tokens, d, columns);
    UNROLLED for (int i = 0; i < kLanes<S>; ++i) {
      squares += columns[i] * columns[i];
      store(target + (d + i) * width, columns[i], Full{});
    }
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

// body(Count<Q>, first) over [0, count): as many sums at a time as the window allows.
template <class Body>
INLINE void for_each_sums(int64_t count, int64_t kernel, Body body) {
  int64_t i = 0;
  if (kernel >= kSums)
    for (; i + kSums <= count; i += kSums) body(Count<kSums>{}, i);
  if (kernel >= 2)
    for (; i + 2 <= count; i += 2) body(Count<2>{}, i);
  for (; i < count; ++i) body(Count<1>{}, i);
}

// ---- forward -----------------------------------------------------------------------------------------------------------------
// logits·log2(e) of R rows of queries against one row of keys, weights[j][offset][column], and their running maximum.
template <int R, int C, class E, class S>
__attribute__((noinline)) void logits(const E* const* queries, const S* const* factors, const E* keys, const S* lengths,
                                      const S* visible, int64_t width, int64_t dim, int64_t groups, int64_t first,
                                      S* const* weights, S* const* tops) {
  for (int64_t column = 0; column < groups * kLanes<S>; column += kLanes<S>) {
    Vector<S> sums[R][C];
    const E* q[R];
    UNROLLED for (int j = 0; j < R; ++j) q[j] = queries[j] + column;
    products<E, R, C>(q, keys + first + column, width, dim, sums);
    UNROLLED for (int j = 0; j < R; ++j) {
      const Vector<S> factor = load(factors[j] + column, Full{});
      Vector<S> top = load(tops[j] + column, Full{});
      UNROLLED for (int i = 0; i < C; ++i) {
        Vector<S> logit = sums[j][i] * load(lengths + first + column + i, Full{}) * factor;
        if (visible != nullptr) logit = (load(visible + first + column + i, Full{}) != 0) ? logit : Vector<S>{} - S(INFINITY);
        top = (logit > top) ? logit : top;
        store(weights[j] + (first + i) * kStrip + column, logit, Full{});
      }
      store(tops[j] + column, top, Full{});
    }
  }
}

// 2^(logits − top) as weights, both [row][offset][column], the inverse of their sum, and lse, of one vector of queries.
template <class S>
INLINE void exponentials(const S* logits, S* weights, int64_t low, int64_t rows, int64_t kernel, Vector<S> top, S* inverse, S* lse) {
  (void)low;
  top = (top == -S(INFINITY)) ? Vector<S>{} : top;  // a query without any key
  Vector<S> sum = {};
  for (int64_t i = 0; i < rows * kernel * kStrip; i += kStrip) {
    const Vector<S> e = exp2(load(logits + i, Full{}) - top);
    sum += e;
    store(weights + i, e, Full{});
  }
  store(inverse, (sum == 0) ? Vector<S>{} : S(1) / sum, Full{});
  store(lse, log(sum) + top * S(kLn2), Full{});
}

#if defined(__AVX512BF16__)
// The same in pairs of rows of the image, (0, 1), (2, 3), …, from that of row `low` on; a row outside the window weighs nothing.
INLINE void exponentials(const float* logits, Pair* weights, int64_t low, int64_t rows, int64_t kernel, FloatVector top,
                         float* inverse, float* lse) {
  top = (top == -INFINITY) ? FloatVector{} : top;
  FloatVector sum = {};
  for (int64_t m = -(low % 2); m < rows; m += 2)
    for (int64_t n = 0; n < kernel; ++n, weights += kStrip) {
      UintVector halves[2] = {};
      for (int64_t half = 0; half < 2; ++half) {
        if (m + half < 0 || m + half >= rows) continue;
        const FloatVector e = exp2(load(logits + ((m + half) * kernel + n) * kStrip, Full{}) - top);
        sum += e;
        halves[half] = rounded(e);
      }
      store(weights, halves[0] | halves[1] << 16);
    }
  store(inverse, (sum == 0) ? FloatVector{} : 1 / sum, Full{});
  store(lse, log(sum) + top * float(kLn2), Full{});
}
#endif

template <class T>
struct Forward {
  using S = Scalar<T>;
  static constexpr int kL = kLanes<T>;
  using E = typename RingOf<T>::Element;
  static constexpr int kPack = kPerElement<E>;  // numbers in an element
  const Call<S>& call;
  const NeighborhoodAttention& a;
  // Rows in a ring of keys; elements in a ring of values along the rows, and in a window; heads whose rings share the cache.
  const int64_t slots, value_slots, window_rows, together;
  Reader<T> reader;
  Columns<S> columns;
  Scratch<E> keys_, values_, queries_;  // of each head
  Scratch<S> lengths_, factors_;
  Scratch<S> logits_, tops, inverse, lse, visible_;
  Scratch<E> weights_;
  Scratch<const E*> weights_seen_, values_seen_;
  Prefetch prefetch;

  explicit Forward(const Call<S>& c)
      : call(c), a(c.a), slots(ring_rows(c)), value_slots((slots - 1) / kPack + kPack),
        window_rows((a.rows.kernel - 1) / kPack + kPack), together(heads_together(c)), reader(c), columns(a.columns),
        keys_(together * slots * a.dim / kPack * c.width), values_(together * value_slots * c.width * a.v_dim),
        queries_(together * kForwardRows * a.dim / kPack * kStrip), lengths_(together * slots * c.width),
        factors_(together * kForwardRows * kStrip), logits_(kForwardRows * a.rows.kernel * a.columns.kernel * kStrip),
        tops(kForwardRows * kStrip), inverse(kForwardRows * kStrip), lse(kForwardRows * kStrip),
        visible_(a.key_mask ? slots * c.width : 0), weights_(kForwardRows * window_rows * a.columns.kernel * kStrip),
        weights_seen_(kForwardRows * window_rows), values_seen_(kForwardRows * window_rows) {}

  static int64_t ring_rows(const Call<S>& c) { return c.a.rows.kernel + kForwardRows - 1; }

  // All heads of a token lie together and are best read together.
  static int64_t heads_together(const Call<S>& c) {
    const int64_t bytes = ring_rows(c) * c.width * (c.a.dim + c.a.v_dim) / kPack * int64_t(sizeof(E));
    return larger(1, smaller(c.a.heads, kRingBytes / bytes));
  }

  E* keys(int64_t n, int64_t slot) const { return keys_.get() + (n * slots + slot) * a.dim / kPack * call.width; }
  S* lengths(int64_t n, int64_t slot) const { return lengths_.get() + (n * slots + slot) * call.width; }
  E* values(int64_t n, int64_t y) const {
    return values_.get() + (n * value_slots + y / kPack % value_slots) * call.width * a.v_dim;
  }
  E* queries(int64_t n, int64_t j) const { return queries_.get() + (n * kForwardRows + j) * a.dim / kPack * kStrip; }
  S* factors(int64_t n, int64_t j) const { return factors_.get() + (n * kForwardRows + j) * kStrip; }
  S* row_logits(int64_t j, int64_t m) const { return logits_.get() + (j * a.rows.kernel + m) * a.columns.kernel * kStrip; }
  E* row_weights(int64_t j, int64_t m) const { return weights_.get() + (j * window_rows + m) * a.columns.kernel * kStrip; }
  S* visible(int64_t slot) const { return a.key_mask ? visible_.get() + slot * call.width : nullptr; }

  // kL queries or keys to the columns of a ring from `target` on; their inverse lengths.
  INLINE Vector<S> load_tokens(const T* const* raw, int64_t row, const int64_t* x, int64_t head, E* target, int64_t width) {
    if constexpr (kPack == 1) {
      return reader.template prepare<false>(raw, row, x, head, reader.staging.get(), target, width);
    } else {
      S* features = reader.transposed.get();
      const Vector<S> inverse = reader.template prepare<false>(raw, row, x, head, reader.staging.get(), features, kL);
      for (int64_t d = 0; d < a.dim / 2; ++d)
        store(target + d * width,
              rounded(load(features + 2 * d * kL, Full{})) | rounded(load(features + (2 * d + 1) * kL, Full{})) << 16);
      return inverse;
    }
  }

  // A value of row y to a ring; `fresh`: what the ring holds beside it is not of this image.
  INLINE void load_value(const T* x, E* target, int64_t y, bool fresh) {
    if constexpr (kPack == 1) {
      copy_token(x, target, a.v_dim);
    } else {
      for (int64_t d = 0; d < a.v_dim; d += kL) {
        const UintVector bits = (UintVector)load(x + d, Full{});  // bfloat16 in the upper half
        if (y % 2 == 0) store(target + d, bits >> 16);
        else store(target + d, fresh ? bits : load(target + d, Full{}) | bits);
      }
    }
  }

  // Row y of keys and values, of heads [head, head + count).
  void load_keys(const Axis& rows, int64_t b, int64_t y, int64_t head, int64_t count, bool fresh) {
    const int64_t slot = y % slots, row = rows.image(y);
    const T* tokens[kL];
    for (int64_t begin = 0; begin < columns.keys; begin += kL) {
      const int64_t* x = columns.key.get() + begin;
      for (int64_t n = 0; n < count; ++n) {
        for (int i = 0; i < kL; ++i) tokens[i] = reader.key(a.k, b, row, x[i], head + n);
        store(lengths(n, slot) + begin, load_tokens(tokens, row, x, head + n, keys(n, slot) + begin, call.width), Full{});
        for (int64_t i = 0; i < smaller(kL, columns.keys - begin); ++i)
          load_value(reader.key(a.v, b, row, x[i], head + n), values(n, y) + (begin + i) * a.v_dim, y, fresh);
      }
      for (int i = 0; i < kL && a.key_mask != nullptr; ++i) visible(slot)[begin + i] = reader.visible(b, row, x[i]);
    }
  }

  void load_queries(const Axis& rows, int64_t b, int64_t i, int64_t j, int64_t head, int64_t count) {
    const int64_t row = rows.image(i);
    const T* tokens[kL];
    for (int64_t begin = 0; begin < columns.queries; begin += kL) {
      const int64_t* x = columns.query.get() + begin;
      for (int64_t n = 0; n < count; ++n) {
        for (int t = 0; t < kL; ++t) tokens[t] = at<const T>(a.q, b, row, x[t], head + n);
        const Vector<S> inverse = load_tokens(tokens, row, x, head + n, queries(n, j) + begin, kStrip);
        store(factors(n, j) + begin, inverse * (logit_factor<S>(a, head + n) * S(kLog2E)), Full{});
      }
    }
  }

  // What the next rows will read, and these write.
  void look_ahead(const Axis& rows, const Axis& axis, int64_t b, int64_t i, int64_t have, int64_t head, int64_t count) {
    const int64_t begin = columns.begin, end = begin + columns.queries;
    const int64_t left = larger(0, begin - axis.kernel / 2), right = smaller(axis.length, end + axis.kernel);
    prefetch.clear();
    for (int64_t j = 0; j < kForwardRows; ++j) {
      ask<T>(prefetch, a.k, rows, axis, b, have + j, left, right, head, count * a.dim);
      ask<T>(prefetch, a.v, rows, axis, b, have + j, left, right, head, count * a.v_dim);
      ask<T>(prefetch, a.q, rows, axis, b, i + kForwardRows + j, begin, end, head, count * a.dim);
      ask<T>(prefetch, call.out, rows, axis, b, i + j, begin, end, head, count * a.v_dim);
    }
  }

  // The logits of R rows of queries from the j-th on against row y of keys.
  template <int R>
  void attend_to_row(const Axis& rows, int64_t i, int64_t n, int64_t j, int64_t y) {
    const E* q[R];
    const S* f[R];
    S *l[R], *t[R];
    for (int m = 0; m < R; ++m) {
      q[m] = queries(n, j + m), f[m] = factors(n, j + m), t[m] = tops.get() + (j + m) * kStrip;
      l[m] = row_logits(j + m, y - rows.low(i + j + m));
    }
    const int64_t slot = y % slots;
    for_each_offsets(a.columns.kernel, [&](auto offsets, int64_t first) INLINED {
      logits<R, decltype(offsets)::value>(q, f, keys(n, slot), lengths(n, slot), visible(slot), call.width, a.dim / kPack,
                                          columns.groups, first, l, t);
    });
  }

  // Rows [i, i + count) of queries of the n-th loaded head.
  void attend(const Axis& rows, int64_t b, int64_t i, int64_t count, int64_t n, int64_t head) {
    const S factor = logit_factor<S>(a, head);
    const bool bounded = call.cosine && factor <= kBoundedFactor && factor >= -kBoundedFactor;
    for (int64_t c = 0; c < count * kStrip; ++c) tops.get()[c] = -S(INFINITY);
    for (int64_t y = rows.low(i); y < rows.low(i + count - 1) + rows.kernel; ++y) {
      int64_t first = 0, last = count - 1;  // rows of queries that see row y
      while (y >= rows.low(i + first) + rows.kernel) ++first;
      while (y < rows.low(i + last)) --last;
      switch (last - first + 1) {
        case 1: attend_to_row<1>(rows, i, n, first, y); break;
        case 2: attend_to_row<2>(rows, i, n, first, y); break;
        case 3: if constexpr (kForwardRows >= 3) attend_to_row<3>(rows, i, n, first, y); break;
      }
    }
    const S bound = (factor < 0 ? -factor : factor) * S(kLog2E);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t low = rows.low(i + j);
      for (int64_t c = 0; c < columns.groups * kL; c += kL)
        exponentials(row_logits(j, 0) + c, row_weights(j, 0) + c, low, rows.kernel, a.columns.kernel,
                     bounded ? Vector<S>{} + bound : load(tops.get() + j * kStrip + c, Full{}), inverse.get() + j * kStrip + c,
                     lse.get() + j * kStrip + c);
      S* target = static_cast<S*>(a.lse) + (b * a.rows.length + rows.image(i + j)) * a.columns.length * a.heads + head;
      for (int64_t c = 0; c < columns.queries; ++c) target[columns.query.get()[c] * a.heads] = lse.get()[j * kStrip + c];
    }
    for_each_sums(columns.queries, a.columns.kernel, [&](auto queries, int64_t begin) {
      for (int64_t j = 0; j < count; ++j) sum_values<decltype(queries)::value>(rows, b, i, j, n, head, begin);
    });
  }

  // The outputs of Q queries of row i + j.
  template <int Q>
  void sum_values(const Axis& rows, int64_t b, int64_t i, int64_t j, int64_t n, int64_t head, int64_t begin) {
    const E **weights = weights_seen_.get(), **seen = values_seen_.get();
    const int64_t low = rows.low(i + j), count = (low + rows.kernel - 1) / kPack - low / kPack + 1;
    for (int64_t m = 0; m < count; ++m) weights[m] = row_weights(j, m), seen[m] = values(n, (low / kPack + m) * kPack);
    const S* scale = inverse.get() + j * kStrip + begin;
    T* out = at<T>(call.out, b, rows.image(i + j), columns.query.get()[begin], head);
    const int64_t stride = a.columns.dilation * call.out.width_stride;
    all_weighted_sums<ByQuery, Q, true>(
        weights, begin, seen, begin, count, a.columns.kernel, 0, 0, a.v_dim, prefetch,
        [&](int64_t q, int64_t f, auto sum) INLINED { store(out + q * stride + f, sum * scale[q], Full{}); });
  }

  // Blocks [begin, end) of kForwardRows rows of one strip of one class of image b.
  void march(int64_t b, int64_t c, int64_t strip, int64_t head, int64_t count, int64_t begin, int64_t end) {
    const Axis rows = call.rows(c), axis = call.columns(c);
    columns.place(axis, strip);
    int64_t have = -1;
    for (int64_t i = begin * kForwardRows; i < smaller(rows.length, end * kForwardRows); i += kForwardRows) {
      const int64_t queries = smaller(kForwardRows, rows.length - i);
      const int64_t from = have < 0 ? rows.low(i) : -1;
      if (have < 0) have = from;
      for (; have < rows.low(i + queries - 1) + rows.kernel; ++have) load_keys(rows, b, have, head, count, have == from);
      for (int64_t j = 0; j < queries; ++j) load_queries(rows, b, i + j, j, head, count);
      look_ahead(rows, axis, b, i, have, head, count);
      for (int64_t n = 0; n < count; ++n) attend(rows, b, i, queries, n, head + n);
    }
  }
};

inline bool fits(const NeighborhoodAttention& a) {
  return a.rows.stride == 1 && a.columns.stride == 1 && !a.rows.causal && !a.columns.causal && a.extra == 0 &&
         a.dim % 16 == 0 && a.v_dim % 16 == 0 && a.dim <= kMostDim && a.v_dim <= kMostDim && a.v_dim > 0;
}

template <class T>
void forward(const NeighborhoodAttention& a, int threads) {
  using S = Scalar<T>;
  const Call<S> call(a);
  const Axis longest = call.rows(0), widest = call.columns(0);
  const int64_t blocks = (longest.length + kForwardRows - 1) / kForwardRows, strips = strips_of<S>(widest);
  const int64_t together = Forward<T>::heads_together(call), groups = (a.heads + together - 1) / together;
  threads = useful_threads(a.batch * a.heads * a.rows.length * a.columns.length * a.rows.kernel * a.columns.kernel, threads);
  parallel_for(a.batch * call.classes() * groups * strips * blocks, threads, [&](int64_t begin, int64_t end) {
    Forward<T> pass(call);
    while (begin < end) {
      const int64_t unit = begin / blocks, first = begin % blocks, last = smaller(blocks, first + end - begin);
      const int64_t strip = unit % strips, group = unit / strips % groups, image = unit / strips / groups;
      const int64_t head = group * together, c = image % call.classes();
      if (strip < strips_of<S>(call.columns(c)))
        pass.march(image / call.classes(), c, strip, head, smaller(together, a.heads - head), first, last);
      begin += last - first;
    }
  });
}

// ---- backward ----------------------------------------------------------------------------------------------------------------
// For R rows of queries against one row of keys: cosines (or products); weights = exp(logit − lse), not yet divided by their
// sums, since the rounding of lse would be every weight's; dweights = dout·value; running sums of weights and of
// weight·dweight. factor: logit·log2(e) over cosine.
template <int R, int C, class S>
__attribute__((noinline)) void weights_and_gradients(const S* const* queries, const S* const* douts,
                                                     const S* const* query_lengths, const S* const* lse, S factor, const S* keys,
                                                     const S* values, const S* lengths, const S* visible, int64_t width,
                                                     int64_t dim, int64_t v_dim, int64_t groups, int64_t first,
                                                     S* const* cosines, S* const* weights, S* const* dweights, S* const* sums,
                                                     S* const* deltas) {
  for (int64_t column = 0; column < groups * kLanes<S>; column += kLanes<S>) {
    Vector<S> results[R][C];
    const S* rows[R];
    UNROLLED for (int j = 0; j < R; ++j) rows[j] = queries[j] + column;
    products_in_parts<S, R, C>(rows, keys + first + column, width, dim, results);
    UNROLLED for (int j = 0; j < R; ++j) {
      const Vector<S> length = load(query_lengths[j] + column, Full{}), bound = load(lse[j] + column, Full{});
      Vector<S> sum = load(sums[j] + column, Full{});
      UNROLLED for (int i = 0; i < C; ++i) {
        const Vector<S> cosine = results[j][i] * load(lengths + first + column + i, Full{}) * length;
        store(cosines[j] + (first + i) * kStrip + column, cosine, Full{});
        Vector<S> e = exp2(cosine * factor - bound);
        if (visible != nullptr) e = (load(visible + first + column + i, Full{}) != 0) ? e : Vector<S>{};
        sum += e;
        store(weights[j] + (first + i) * kStrip + column, e, Full{});
      }
      store(sums[j] + column, sum, Full{});
    }
    UNROLLED for (int j = 0; j < R; ++j) rows[j] = douts[j] + column;
    products_in_parts<S, R, C>(rows, values + first + column, width, v_dim, results);
    UNROLLED for (int j = 0; j < R; ++j) {
      Vector<S> delta = load(deltas[j] + column, Full{});
      UNROLLED for (int i = 0; i < C; ++i) {
        delta += load(weights[j] + (first + i) * kStrip + column, Full{}) * results[j][i];
        store(dweights[j] + (first + i) * kStrip + column, results[j][i], Full{});
      }
      store(deltas[j] + column, delta, Full{});
    }
  }
}

// The rows of queries and of virtual keys that one task works on. Row v of virtual keys is row v, or, above and below the
// image, what the wrapped window reads there; its queries are rows v + kernel/2 − kernel < i <= v + kernel/2.
struct Segment {
  int64_t first_key, last_key, first_query, last_query, first_own;  // rows of queries from first_own on get their gradient

  Segment(const Axis& rows, int64_t part, int64_t parts) {
    const int64_t half = rows.kernel / 2;
    first_key = part == 0 ? -half : rows.length * part / parts;
    last_key = part == parts - 1 ? rows.length + rows.kernel - 1 - half : rows.length * (part + 1) / parts;
    first_query = larger(0, first_key + half - rows.kernel + 1);
    last_query = smaller(rows.length, last_key + half);
    first_own = part == 0 ? 0 : first_key + half;
  }
};

template <class T>
struct Backward {
  using S = Scalar<T>;
  static constexpr int kL = kLanes<T>, kR = kBackwardRows;
  const Call<S>& call;
  const NeighborhoodAttentionBackward& g;
  const NeighborhoodAttention& a;
  const int64_t slots, kernel, sums_dim;  // rows in a ring; columns of a window; dim + v_dim
  Reader<T> reader;
  Columns<S> columns;
  // Rings, one row a slot: keys turned, token by token and transposed, values transposed, 1 / lengths; queries and dout token
  // by token, weights and gradients of the products q·k.
  Scratch<S> tokens_, keys_, values_, lengths_, visible_, queries_, douts_, query_lengths_, weights_, dweights_;
  // Of the rows at work: queries and dout transposed, cosines, and numbers for each query.
  Scratch<S> query_rows_, dout_rows_, cosines_, lse_, dlse_, sums_, deltas_;
  // Gradients of turned keys and of values, side by side: of the row at work, of rows that wait for the other end of a wrapped
  // window, and, of every row, of the columns that the next strip shares.
  Scratch<S> row, held, carried, gradient;
  Scratch<const S*> seen_weights, seen_dweights, seen_queries, seen_douts;
  Prefetch prefetch;

  Backward(const Call<S>& c, const NeighborhoodAttentionBackward& grads, int64_t most_rows)
      : call(c), g(grads), a(c.a), slots(a.rows.kernel + kR - 1), kernel(a.columns.kernel), sums_dim(a.dim + a.v_dim),
        reader(c), columns(a.columns), tokens_(slots * c.width * a.dim), keys_(slots * a.dim * c.width),
        values_(slots * a.v_dim * c.width), lengths_(slots * c.width), visible_(a.key_mask ? slots * c.width : 0),
        queries_(slots * kStrip * a.dim), douts_(slots * kStrip * a.v_dim), query_lengths_(slots * kStrip),
        weights_(slots * a.rows.kernel * kernel * kStrip), dweights_(slots * a.rows.kernel * kernel * kStrip),
        query_rows_(kR * a.dim * kStrip), dout_rows_(kR * a.v_dim * kStrip), cosines_(kR * a.rows.kernel * kernel * kStrip), lse_(kR * kStrip),
        dlse_(kR * kStrip), sums_(kR * kStrip), deltas_(kR * kStrip), row(c.width * sums_dim), held(a.rows.kernel * c.width * sums_dim),
        carried(strips_of<S>(c.columns(0)) > 1 ? most_rows * kernel * sums_dim : 0), gradient(kSums * a.dim),
        seen_weights(a.rows.kernel), seen_dweights(a.rows.kernel), seen_queries(a.rows.kernel), seen_douts(a.rows.kernel) {}

  int64_t slot(int64_t i) const { return (i + slots) % slots; }
  S* tokens(int64_t y) const { return tokens_.get() + slot(y) * call.width * a.dim; }
  S* keys(int64_t y) const { return keys_.get() + slot(y) * a.dim * call.width; }
  S* values(int64_t y) const { return values_.get() + slot(y) * a.v_dim * call.width; }
  S* lengths(int64_t y) const { return lengths_.get() + slot(y) * call.width; }
  S* visible(int64_t y) const { return a.key_mask ? visible_.get() + slot(y) * call.width : nullptr; }
  S* queries(int64_t i) const { return queries_.get() + slot(i) * kStrip * a.dim; }
  S* douts(int64_t i) const { return douts_.get() + slot(i) * kStrip * a.v_dim; }
  S* query_lengths(int64_t i) const { return query_lengths_.get() + slot(i) * kStrip; }
  S* weights(int64_t i, int64_t m) const { return weights_.get() + (slot(i) * a.rows.kernel + m) * kernel * kStrip; }
  S* dweights(int64_t i, int64_t m) const { return dweights_.get() + (slot(i) * a.rows.kernel + m) * kernel * kStrip; }

  // Row y of virtual keys.
  void load_keys(const Axis& rows, int64_t b, int64_t y, int64_t head) {
    const int64_t image = rows.image(rows.wrapped(y));
    const T* raw[kL];
    for (int64_t begin = 0; begin < columns.keys; begin += kL) {
      const int64_t* x = columns.key.get() + begin;
      for (int i = 0; i < kL; ++i) raw[i] = reader.key(a.k, b, image, x[i], head);
      const Vector<S> inverse = reader.template prepare<true>(raw, image, x, head, tokens(y) + begin * a.dim, keys(y) + begin, call.width);
      store(lengths(y) + begin, inverse, Full{});
      for (int i = 0; i < kL; ++i) raw[i] = reader.key(a.v, b, image, x[i], head);
      reader.transpose_plain(raw, a.v_dim, values(y) + begin, call.width);
      for (int i = 0; i < kL && a.key_mask != nullptr; ++i) visible(y)[begin + i] = reader.visible(b, image, x[i]);
    }
  }

  // Row i of queries, the j-th at work.
  void load_queries(const Axis& rows, int64_t b, int64_t i, int64_t j, int64_t head) {
    const int64_t image = rows.image(i), tokens_before = (b * a.rows.length + image) * a.columns.length;
    const S *lse = static_cast<const S*>(a.lse), *dlse = static_cast<const S*>(g.dlse);
    const T *raw[kL], *zeros = reader.zeros.get();
    for (int64_t begin = 0; begin < columns.queries; begin += kL) {
      const int64_t *x = columns.query.get() + begin, at_work = j * kStrip + begin;
      for (int t = 0; t < kL; ++t) raw[t] = at<const T>(a.q, b, image, x[t], head);
      const Vector<S> inverse = reader.template prepare<true>(raw, image, x, head, queries(i) + begin * a.dim,
                                               query_rows_.get() + j * a.dim * kStrip + begin, kStrip);
      store(query_lengths(i) + begin, inverse, Full{});
      for (int t = 0; t < kL; ++t) {
        raw[t] = g.dout.data == nullptr ? zeros : at<const T>(g.dout, b, image, x[t], head);
        copy_token(raw[t], douts(i) + (begin + t) * a.v_dim, a.v_dim);
        const int64_t token = (tokens_before + x[t]) * a.heads + head;
        lse_.get()[at_work + t] = lse[token] * S(kLog2E);
        dlse_.get()[at_work + t] = dlse == nullptr ? S(0) : dlse[token];
        sums_.get()[at_work + t] = deltas_.get()[at_work + t] = 0;
      }
      reader.transpose_plain(raw, a.v_dim, dout_rows_.get() + j * a.v_dim * kStrip + begin, kStrip);
    }
  }

  S* cosines(int64_t at_work, int64_t m) const { return cosines_.get() + (at_work * a.rows.kernel + m) * kernel * kStrip; }

  // Weights and gradients of the products, of `count` rows of queries from i on.
  void differentiate(const Axis& rows, int64_t i, int64_t count, int64_t head) {
    const S factor = logit_factor<S>(a, head) * S(kLog2E);
    const int64_t above = rows.kernel / 2;
    for (int64_t y = i - above; y < i + count - above + rows.kernel - 1; ++y) {
      // Rows of queries that see row y: i + j − above <= y < i + j − above + kernel.
      const int64_t first = larger(0, y + above - rows.kernel + 1 - i), last = smaller(count - 1, y + above - i);
      switch (last - first + 1) {
        case 1: differentiate_rows<1>(rows, i, first, y, factor); break;
        case 2: differentiate_rows<2>(rows, i, first, y, factor); break;
        case 3: differentiate_rows<3>(rows, i, first, y, factor); break;
      }
    }
  }

  template <int R>
  void differentiate_rows(const Axis& rows, int64_t i, int64_t j, int64_t y, S factor) {
    const S *q[R], *d[R], *f[R], *l[R];
    S *c[R], *w[R], *dw[R], *s[R], *t[R];
    for (int m = 0; m < R; ++m) {
      const int64_t at_work = j + m, offset = y - (i + at_work - rows.kernel / 2);
      q[m] = query_rows_.get() + at_work * a.dim * kStrip, d[m] = dout_rows_.get() + at_work * a.v_dim * kStrip;
      f[m] = query_lengths(i + at_work), l[m] = lse_.get() + at_work * kStrip;
      s[m] = sums_.get() + at_work * kStrip, t[m] = deltas_.get() + at_work * kStrip;
      c[m] = cosines(at_work, offset), w[m] = weights(i + at_work, offset), dw[m] = dweights(i + at_work, offset);
    }
    for_each_offsets(kernel, [&](auto offsets, int64_t first) INLINED {
      weights_and_gradients<R, decltype(offsets)::value, S>(q, d, f, l, factor, keys(y), values(y), lengths(y), visible(y),
                                                            call.width, a.dim, a.v_dim, columns.groups, first, c, w, dw, s, t);
    });
  }

  // Weights are divided by their sum, dweights become the gradients of q·k over the logit's factor, of one vector of queries
  // of row i, the j-th at work. Returns its part of the gradient of that factor.
  double normalise(const Axis& rows, int64_t i, int64_t j, int64_t column) {
    const int64_t at_work = j * kStrip + column;
    const Vector<S> sum = load(sums_.get() + at_work, Full{});
    const Vector<S> inverse = (sum == 0) ? Vector<S>{} : S(1) / sum;  // 0: a query without any key
    const Vector<S> delta = load(deltas_.get() + at_work, Full{}) * inverse - load(dlse_.get() + at_work, Full{});
    const Vector<S> query_length = load(query_lengths(i) + column, Full{});
    DoubleVector dfactor[kWidened<S>] = {};  // terms of both signs: in float32 their sum would lose more than they do
    for (int64_t m = 0; m < rows.kernel; ++m) {
      S *w = weights(i, m) + column, *dw = dweights(i, m) + column;
      const S *length = lengths(i - rows.kernel / 2 + m) + column, *cosine = cosines(j, m) + column;
      Vector<S> part = {};
      for (int64_t n = 0; n < kernel * kStrip; n += kStrip, ++length) {
        const Vector<S> weight = load(w + n, Full{}) * inverse, dlogit = weight * (load(dw + n, Full{}) - delta);
        store(w + n, weight, Full{});
        store(dw + n, dlogit * (query_length * load(length, Full{})), Full{});
        part += dlogit * load(cosine + n, Full{});
      }
      add_widened(dfactor, part);
    }
    double lanes[kL], total = 0;
    std::memcpy(lanes, dfactor, sizeof lanes);
    for (int64_t c = 0; c < smaller(kL, columns.queries - column); ++c) total += lanes[c];
    return total;
  }

  // The gradient of a raw token from d, that of the turned and not yet normalised one, x: with n = 1 / length it is
  // d − n²·x·(x·d), turned back, times `factor`.
  void write_gradient(S* d, const S* x, S inverse, S factor, int64_t row_place, int64_t column, int64_t head, T* result) const {
    const S along = call.cosine ? dot_tokens(d, x, a.dim) : S(0), back = -inverse * inverse * along;
    for (int64_t i = 0; i < a.dim; i += kL)
      store(d + i, (load(d + i, Full{}) + (call.cosine ? load(x + i, Full{}) * back : Vector<S>{})) * factor, Full{});
    turn(d, d, call.row_turns.at(row_place, head), call.column_turns.at(column, head), a.angles, S(-1));
    for (int64_t i = 0; i < a.dim; i += kL) store(result + i, load(d + i, Full{}), Full{});
  }

  // dq of row i.
  void write_queries(const Axis& rows, int64_t b, int64_t i, int64_t head) {
    const int64_t image = rows.image(i);
    const S factor = logit_factor<S>(a, head);
    for (int64_t m = 0; m < rows.kernel; ++m) {
      seen_dweights.get()[m] = dweights(i, m);
      seen_queries.get()[m] = tokens(i - rows.kernel / 2 + m);
    }
    for_each_sums(columns.queries, kernel, [&](auto count, int64_t begin) {
      constexpr int Q = decltype(count)::value;
      S* sums = gradient.get();
      all_weighted_sums<ByQuery, Q, true>(seen_dweights.get(), begin, seen_queries.get(), begin, rows.kernel, kernel, 0, 0,
                                          a.dim, prefetch, [&](int64_t q, int64_t d, auto sum) INLINED {
                                            store(sums + q * a.dim + d, sum, Full{});
                                          });
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t x = columns.query.get()[begin + q];
        write_gradient(sums + q * a.dim, queries(i) + (begin + q) * a.dim, query_lengths(i)[begin + q], factor, image, x, head,
                       at<T>(g.dq, b, image, x, head));
      }
    });
  }

  // Gradients of the turned keys and of the values of virtual row y, whose queries have all been seen, to `row`.
  void sum_keys(const Axis& rows, int64_t y) {
    int64_t count = 0;
    for (int64_t m = 0; m < rows.kernel; ++m) {
      const int64_t i = y + rows.kernel / 2 - m;
      if (i < 0 || i >= rows.length) continue;
      seen_weights.get()[count] = weights(i, m), seen_dweights.get()[count] = dweights(i, m);
      seen_queries.get()[count] = queries(i), seen_douts.get()[count] = douts(i);
      ++count;
    }
    S* sums = row.get();
    for_each_sums(columns.keys, kernel, [&](auto number, int64_t begin) {
      // Token t is the query of column `from` + t.
      const int64_t from = begin - kernel + 1, weight = (kernel - 1) * kStrip + from;
      const bool inside = from >= 0 && begin + decltype(number)::value <= columns.queries;
      const auto sum_up = [&](const S* const* w, const S* const* tokens, int64_t dim, int64_t offset, auto all) {
        all_weighted_sums<ByKey, decltype(number)::value, decltype(all)::value>(
            w, weight, tokens, from, count, kernel, -from, columns.queries - from, dim, prefetch,
            [&](int64_t k, int64_t d, auto sum) INLINED { store(sums + (begin + k) * sums_dim + offset + d, sum, Full{}); });
      };
      if (inside) {
        sum_up(seen_dweights.get(), seen_queries.get(), a.dim, 0, Count<true>{});
        sum_up(seen_weights.get(), seen_douts.get(), a.v_dim, a.dim, Count<true>{});
      } else {
        sum_up(seen_dweights.get(), seen_queries.get(), a.dim, 0, Count<false>{});
        sum_up(seen_weights.get(), seen_douts.get(), a.v_dim, a.dim, Count<false>{});
      }
    });
  }

  void add_sums(S* to, const S* from, int64_t count) const {
    for (int64_t i = 0; i < count * sums_dim; i += kL) store(to + i, load(to + i, Full{}) + load(from + i, Full{}), Full{});
  }

  // dk and dv of virtual row y, or of the row that it stands for, once both are summed.
  void write_keys(const Axis& rows, const Axis& axis, const Segment& segment, int64_t b, int64_t y, int64_t strip, int64_t head) {
    const int64_t above = rows.kernel / 2, below = rows.kernel - 1 - above, row_size = call.width * sums_dim;
    sum_keys(rows, y);
    S* sums = row.get();
    // Row v < 0 stands for v + kernel, which comes later; row v >= length for v − kernel, which has waited.
    S *held_above = held.get() + (y + above) * row_size, *held_below = held.get() + (above + y - rows.length) * row_size;
    if (y < 0) return void(std::memcpy(held_above, sums, columns.keys * sums_dim * sizeof(S)));
    if (y >= rows.length) add_sums(sums, held_below, columns.keys);
    else if (y >= rows.kernel - above && y < rows.kernel) add_sums(sums, held_above - rows.kernel * row_size, columns.keys);
    if (y >= rows.length - rows.kernel && y < rows.length - rows.kernel + below)
      return void(std::memcpy(held_below + rows.kernel * row_size, sums, columns.keys * sums_dim * sizeof(S)));

    const int64_t left = axis.kernel / 2, place = rows.wrapped(y), strips = strips_of<S>(axis);
    int64_t begin = 0, end = columns.queries;
    if (strip == 0) {  // columns left of the image stand for those a kernel further right
      begin = left, end += strips == 1 ? left : 0;
      for (int64_t x = 0; x < left; ++x) add_sums(sums + (x + kernel) * sums_dim, sums + x * sums_dim, 1);
    }
    if (strip == strips - 1) {
      end = left + columns.queries;
      for (int64_t x = end; x < columns.keys; ++x) add_sums(sums + (x - kernel) * sums_dim, sums + x * sums_dim, 1);
    }
    S* shared = carried.get() + (place - larger(0, segment.first_key)) * kernel * sums_dim;
    if (strip > 0) add_sums(sums, shared, kernel - 1);
    if (strip < strips - 1) std::memcpy(shared, sums + end * sums_dim, (kernel - 1) * sums_dim * sizeof(S));
    const int64_t image = rows.image(place);
    const S factor = logit_factor<S>(a, head);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x = columns.key.get()[i];
      S *dkey = sums + i * sums_dim, *dvalue = dkey + a.dim;
      if (!reader.visible(b, image, x)) std::memset(dkey, 0, sums_dim * sizeof(S));  // whatever its queries hold
      if (g.dk.data != nullptr)
        write_gradient(dkey, tokens(y) + i * a.dim, lengths(y)[i], factor, image, x, head, at<T>(g.dk, b, image, x, head));
      if (g.dv.data == nullptr) continue;
      T* result = at<T>(g.dv, b, image, x, head);
      for (int64_t d = 0; d < a.v_dim; d += kL) store(result + d, load(dvalue + d, Full{}), Full{});
    }
  }

  // What the next rows will read, and these write.
  void look_ahead(const Axis& rows, const Axis& axis, int64_t b, int64_t i, int64_t have, int64_t head) {
    const int64_t begin = columns.begin, end = begin + columns.queries;
    const int64_t left = larger(0, begin - axis.kernel / 2), right = smaller(axis.length, end + axis.kernel);
    prefetch.clear();
    for (int64_t j = 0; j < kR; ++j) {
      ask<T>(prefetch, g.dq, rows, axis, b, i + j, begin, end, head, a.dim);
      ask<T>(prefetch, g.dk, rows, axis, b, i + j - rows.kernel / 2, begin, end, head, a.dim);
      ask<T>(prefetch, g.dv, rows, axis, b, i + j - rows.kernel / 2, begin, end, head, a.v_dim);
      ask<T>(prefetch, a.k, rows, axis, b, have + j, left, right, head, a.dim);
      ask<T>(prefetch, a.v, rows, axis, b, have + j, left, right, head, a.v_dim);
      ask<T>(prefetch, a.q, rows, axis, b, i + kR + j, begin, end, head, a.dim);
      ask<T>(prefetch, g.dout, rows, axis, b, i + kR + j, begin, end, head, a.v_dim);
    }
  }

  // One strip of one head; dscale has a number for each row of queries.
  void march(const Axis& rows, const Axis& axis, const Segment& segment, int64_t b, int64_t strip, int64_t head, double* dscale) {
    columns.place(axis, strip);
    const int64_t above = rows.kernel / 2;
    const bool want_keys = g.dk.data != nullptr || g.dv.data != nullptr;
    int64_t have = segment.first_query - above, done = segment.first_key;
    for (int64_t i = segment.first_query; i < segment.last_query; i += kR) {
      const int64_t count = smaller(kR, segment.last_query - i);
      for (; have < i + count - above + rows.kernel - 1; ++have) load_keys(rows, b, have, head);
      for (int64_t j = 0; j < count; ++j) load_queries(rows, b, i + j, j, head);
      look_ahead(rows, axis, b, i, have, head);
      differentiate(rows, i, count, head);
      for (int64_t j = 0; j < count; ++j) {
        double dfactor = 0;
        for (int64_t column = 0; column < columns.queries; column += kL) dfactor += normalise(rows, i + j, j, column);
        if (i + j < segment.first_own) continue;
        dscale[i + j] += dfactor;
        if (g.dq.data != nullptr) write_queries(rows, b, i + j, head);
      }
      const int64_t ready = i + count == segment.last_query ? segment.last_key : i + count - above;
      for (; done < ready; ++done)
        if (want_keys) write_keys(rows, axis, segment, b, done, strip, head);
    }
  }
};

// The gradients of all keys of a strip lie in one row, and no strip shares columns with more than its neighbours.
inline bool fits_backward(const NeighborhoodAttention& a) {
  return fits(a) && (a.columns.kernel <= 17 || a.columns.length <= kStrip);
}

template <class T>
void backward(const NeighborhoodAttentionBackward& g, int threads) {
  using S = Scalar<T>;
  const NeighborhoodAttention& a = g.forward;
  const Call<S> call(a);
  const int64_t classes = call.classes(), length = call.rows(0).length, units = a.batch * classes * a.heads;
  threads = useful_threads(a.batch * a.heads * a.rows.length * a.columns.length * a.rows.kernel * a.columns.kernel, threads);
  // Heads and images go to the threads whole if that is even; else rows are cut, at the price of kernel − 1 rows done twice.
  const int64_t parts = larger(1, smaller(units % threads == 0 ? 1 : threads, (length - 1) / (2 * a.rows.kernel)));
  const int64_t most_rows = length / parts + a.rows.kernel + 1;
  Scratch<double> dscale(units * length);
  std::memset(dscale.get(), 0, units * length * sizeof(double));
  parallel_for(units * parts, threads, [&](int64_t begin, int64_t end) {
    Backward<T> pass(call, g, most_rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / parts, head = unit % a.heads, c = unit / a.heads % classes, b = unit / a.heads / classes;
      const Axis rows = call.rows(c), axis = call.columns(c);
      const Segment segment(rows, task % parts, parts);
      for (int64_t strip = 0; strip < strips_of<S>(axis); ++strip)
        pass.march(rows, axis, segment, b, strip, head, dscale.get() + unit * length);
    }
  });
  if (g.dcosine_scale == nullptr) return;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t head = 0; head < a.heads; ++head) {
      double sum = 0;
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t i = 0; i < length; ++i) sum += dscale.get()[((b * classes + c) * a.heads + head) * length + i];
      static_cast<S*>(g.dcosine_scale)[b * a.heads + head] = S(sum * a.scale);
    }
}

}  // namespace

#if defined(__AVX512BF16__)
// Of this instruction set only what the one below has not: the forward pass of bfloat16.
template <>
bool neighborhood_attention_strips_forward<Avx512Bf16>(const NeighborhoodAttention& args, int threads) {
  if (args.dtype != DType::bfloat16 || !fits(args)) return false;
  forward<BFloat16>(args, threads);
  return true;
}
#else
template <class InstructionSet>
bool neighborhood_attention_strips_forward(const NeighborhoodAttention& args, int threads) {
  if (!fits(args)) return false;
  with_element_type(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
  return true;
}

template <class InstructionSet>
bool neighborhood_attention_strips_backward(const NeighborhoodAttentionBackward& args, int threads) {
  if (!fits_backward(args.forward)) return false;
  with_element_type(args.forward.dtype, [&](auto element) { backward<decltype(element)>(args, threads); });
  return true;
}

template bool neighborhood_attention_strips_forward<Native>(const NeighborhoodAttention&, int);
template bool neighborhood_attention_strips_backward<Native>(const NeighborhoodAttentionBackward&, int);
#endif

}  // namespace hdit
