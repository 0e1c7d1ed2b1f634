#include "cosine_rope.h"

namespace hdit {
namespace {

constexpr double kEps = 1e-6;  // in the lengths of q and k, as in the reference

// Rows are cut into pieces of so many elements at most: a single row can occupy every thread, and what a piece needs of
// cosines and sines stays in the cache. The cut depends on the shape alone, and so do the sums over a piece.
constexpr int64_t kElementsPerPiece = 8192;

// ---- sizes ---------------------------------------------------------------------------------------------------------------
// Features of a head, and half of those that turn.
struct AnySize {
  int64_t dim, half;
};
// HDiT's: known to the compiler, so that its loops are unrolled and its copies are no calls.
template <int kDim>
struct FixedSize {
  static constexpr int64_t dim = kDim, half = kDim / 4;
};

template <class Body>
inline void with_size(const CosineRope& a, Body body) {
  if (a.dim == 64 && a.angles == 8) return body(FixedSize<64>{});
  if (a.dim == 128 && a.angles == 16) return body(FixedSize<128>{});
  body(AnySize{a.dim, 2 * a.angles});
}

// ---- cosines and sines ---------------------------------------------------------------------------------------------------
// Of (length, heads, angles) angles.
template <class S>
struct Rotations {
  Scratch<S> cos, sin;

  Rotations(const void* angles, DType dtype, int64_t count) : cos(count), sin(count) {
    if (dtype == (sizeof(S) == sizeof(double) ? DType::float64 : DType::float32)) {
      sincos(static_cast<const S*>(angles), cos.get(), sin.get(), count);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {  // float64 angles of float32 arithmetic: many turns keep their digits
      cos.get()[i] = S(std::cos(static_cast<const double*>(angles)[i]));
      sin.get()[i] = S(std::sin(static_cast<const double*>(angles)[i]));
    }
  }
};

// What a head turns by, 2·angles cosines and sines side by side, for all tokens of a piece of a row: (columns, heads,
// 2·angles). From one row to the next only the first half of each is written anew.
template <class S>
class Turns {
 public:
  Turns(const CosineRope& a, const Rotations<S>& rows, const Rotations<S>& columns, int64_t most_columns)
      : a_(a), rows_(rows), columns_(columns), cos_(most_columns * a.heads * 2 * a.angles),
        sin_(most_columns * a.heads * 2 * a.angles) {}

  template <class Size>
  void move_to(int64_t row, int64_t column, int64_t columns, Size size) {
    if (column != column_) copy(columns_, column, 1, size.half / 2, columns, size);
    if (column != column_ || row != row_) copy(rows_, row, 0, 0, columns, size);
    row_ = row, column_ = column;
  }

  const S* cos() const { return cos_.get(); }
  const S* sin() const { return sin_.get(); }

 private:
  template <class Size>
  void copy(const Rotations<S>& from, int64_t first, int64_t step, int64_t offset, int64_t columns, Size size) {
    const int64_t heads = a_.heads, angles = size.half / 2;
    S *cos = cos_.get() + offset, *sin = sin_.get() + offset;
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t source = ((first + x * step) * heads + h) * angles;
        std::memcpy(cos, from.cos.get() + source, angles * sizeof(S));
        std::memcpy(sin, from.sin.get() + source, angles * sizeof(S));
        cos += size.half, sin += size.half;
      }
  }

  const CosineRope& a_;
  const Rotations<S>&rows_, &columns_;
  Scratch<S> cos_, sin_;
  int64_t row_ = -1, column_ = -1;
};

// ---- one head of one token: `dim` features, of which the first 2·`half` turn -----------------------------------------------
template <class T, class Size>
inline Scalar<T> squares(const T* x, Size size) {
  Vector<T> sum = {};
  for_each_vector<T>(size.dim, [&](int64_t i, auto part) {
    const auto v = load(x + i, part);
    sum += v * v;
  });
  return sum_lanes(sum);
}

// y = by · R(x)
template <class T, class Size>
inline void turn(const T* x, const Scalar<T>* cos, const Scalar<T>* sin, Size size, Scalar<T> by, T* y) {
  const int64_t dim = size.dim, half = size.half;
  for_each_vector<T>(half, [&](int64_t i, auto part) {
    const auto a = load(x + i, part) * by, b = load(x + half + i, part) * by;
    const auto c = load(cos + i, part), s = load(sin + i, part);
    store(y + i, a * c - b * s, part);
    store(y + half + i, b * c + a * s, part);
  });
  for_each_vector<T>(dim - 2 * half, [&](int64_t i, auto part) {
    store(y + 2 * half + i, load(x + 2 * half + i, part) * by, part);
  });
}

// Σx² and x·d, with d the gradient dy turned back.
template <class T, class Size>
inline void products(const T* x, const T* dy, const Scalar<T>* cos, const Scalar<T>* sin, Size size, Scalar<T>& squares,
                     Scalar<T>& along) {
  const int64_t dim = size.dim, half = size.half;
  Vector<T> sums[2] = {};
  for_each_vector<T>(half, [&](int64_t i, auto part) {
    const auto a = load(x + i, part), b = load(x + half + i, part);
    const auto da = load(dy + i, part), db = load(dy + half + i, part);
    const auto c = load(cos + i, part), s = load(sin + i, part);
    sums[0] += a * a + b * b;
    sums[1] += a * (da * c + db * s) + b * (db * c - da * s);
  });
  for_each_vector<T>(dim - 2 * half, [&](int64_t i, auto part) {
    const auto v = load(x + 2 * half + i, part);
    sums[0] += v * v;
    sums[1] += v * load(dy + 2 * half + i, part);
  });
  squares = sum_lanes(sums[0]), along = sum_lanes(sums[1]);
}

// dx = by · d − back · x
template <class T, class Size>
inline void turn_back(const T* x, const T* dy, const Scalar<T>* cos, const Scalar<T>* sin, Size size, Scalar<T> by,
                      Scalar<T> back, T* dx) {
  const int64_t dim = size.dim, half = size.half;
  for_each_vector<T>(half, [&](int64_t i, auto part) {
    const auto a = load(x + i, part), b = load(x + half + i, part);
    const auto da = load(dy + i, part) * by, db = load(dy + half + i, part) * by;
    const auto c = load(cos + i, part), s = load(sin + i, part);
    store(dx + i, da * c + db * s - a * back, part);
    store(dx + half + i, db * c - da * s - b * back, part);
  });
  for_each_vector<T>(dim - 2 * half, [&](int64_t i, auto part) {
    const int64_t j = 2 * half + i;
    store(dx + j, load(dy + j, part) * by - load(x + j, part) * back, part);
  });
}

// ---- all tokens ----------------------------------------------------------------------------------------------------------
struct Pieces {
  int64_t columns = 0, count = 0;

  explicit Pieces(const CosineRope& a) {
    if (a.batch * a.height * a.width * a.heads * a.dim == 0) return;
    const int64_t fit = kElementsPerPiece / (a.heads * a.dim);
    columns = fit < 1 ? 1 : fit < a.width ? fit : a.width;
    count = (a.width + columns - 1) / columns * a.height * a.batch;
  }
};

// Heads are taken in blocks: first the sums of all heads of a block, then their roots, then what they scale. One head after
// the other would wait for its root, and the processor looks ahead at too few others meanwhile.
constexpr int64_t kHeadsPerBlock = 16;

inline int64_t columns_per_block(const CosineRope& a) { return a.heads < kHeadsPerBlock ? kHeadsPerBlock / a.heads : 1; }
inline int64_t scratch_per_block(const CosineRope& a) { return 2 * columns_per_block(a) * a.heads; }

struct Piece {
  int64_t number, image, row, column, columns;
  int64_t first_token;  // among all tokens
};

// body(piece, turns, scratch memory) over all pieces of all rows, those below each other in turn.
template <class S, class Size, class Body>
inline void for_each_piece(const CosineRope& a, const Pieces& pieces, Size size, int threads, Body body) {
  const Rotations<S> rows(a.height_angles, a.angles_dtype, a.height * a.heads * a.angles);
  const Rotations<S> columns(a.width_angles, a.angles_dtype, a.width * a.heads * a.angles);
  const int64_t elements = 2 * a.batch * a.height * a.width * a.heads * a.dim;
  parallel_for(pieces.count, useful_threads(elements, threads), [&](int64_t begin, int64_t end) {
    Turns<S> turns(a, rows, columns, pieces.columns);
    const Scratch<S> scratch(scratch_per_block(a));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t image = n % a.batch, row = n / a.batch % a.height, column = n / a.batch / a.height * pieces.columns;
      const int64_t count = a.width - column < pieces.columns ? a.width - column : pieces.columns;
      turns.move_to(row, column, count, size);
      body(Piece{n, image, row, column, count, (image * a.height + row) * a.width + column}, turns, scratch.get());
    }
  });
}

// The heads of a piece of a tensor.
template <class T>
struct Heads {
  T* first;
  int64_t token_stride, head_stride;

  Heads(const Tokens& t, const Piece& p)
      : first(static_cast<T*>(t.data) + p.image * t.batch_stride + p.row * t.height_stride + p.column * t.width_stride),
        token_stride(t.width_stride), head_stride(t.head_stride) {}
  Heads(void* contiguous, const Piece& p, int64_t heads, int64_t dim)
      : first(contiguous == nullptr ? nullptr : static_cast<T*>(contiguous) + p.first_token * heads * dim),
        token_stride(heads * dim), head_stride(dim) {}

  T* at(int64_t column, int64_t head) const { return first + column * token_stride + head * head_stride; }
};

// One side, q or k, of a piece: y = scale · R(x / length).
template <class T, class Size, class S = Scalar<T>>
inline void forward_side(const CosineRope& a, const Piece& piece, const Heads<const T> x, const Turns<S>& turns, Size size,
                         const S* scale, S* scratch, const Heads<T> y) {
  const int64_t heads = a.heads, step = columns_per_block(a);
  const S *cos = turns.cos(), *sin = turns.sin();
  for (int64_t begin = 0; begin < piece.columns; begin += step) {
    const int64_t end = piece.columns - begin < step ? piece.columns : begin + step, count = (end - begin) * heads;
    int64_t i = 0;
    for (int64_t column = begin; column < end; ++column)
      for (int64_t h = 0; h < heads; ++h) scratch[i++] = squares(x.at(column, h), size);
    for (i = 0; i < count; ++i) scratch[i] = 1 / std::sqrt(scratch[i] + S(kEps));
    i = 0;
    for (int64_t column = begin; column < end; ++column)
      for (int64_t h = 0; h < heads; ++h) {
        turn(x.at(column, h), cos, sin, size, scale == nullptr ? scratch[i] : scratch[i] * scale[h], y.at(column, h));
        cos += size.half, sin += size.half, ++i;
      }
  }
}

// With n = 1 / length: dx = scale · (n·d − n³·x·(x·d)), unless that is null. Adds n·(x·d), the gradient of scale, to sums,
// one a head, unless that is null.
template <class T, class Size, class S = Scalar<T>>
inline void backward_side(const CosineRope& a, const Piece& piece, const Heads<const T> x, const Heads<const T> dy,
                          const Turns<S>& turns, Size size, const S* scale, S* scratch, const Heads<T> dx, double* sums) {
  const int64_t heads = a.heads, step = columns_per_block(a);
  const S *cos = turns.cos(), *sin = turns.sin();
  for (int64_t begin = 0; begin < piece.columns; begin += step) {
    const int64_t end = piece.columns - begin < step ? piece.columns : begin + step, count = (end - begin) * heads;
    S *inverse = scratch, *along = scratch + count;
    const S *block_cos = cos, *block_sin = sin;
    int64_t i = 0;
    for (int64_t column = begin; column < end; ++column)
      for (int64_t h = 0; h < heads; ++h) {
        products(x.at(column, h), dy.at(column, h), cos, sin, size, inverse[i], along[i]);
        cos += size.half, sin += size.half, ++i;
      }
    for (i = 0; i < count; ++i) {
      inverse[i] = 1 / std::sqrt(inverse[i] + S(kEps));
      along[i] *= inverse[i];
    }
    for (i = 0; sums != nullptr && i < count; ++i) sums[i % heads] += double(along[i]);
    if (dx.first == nullptr) continue;
    i = 0;
    for (int64_t column = begin; column < end; ++column)
      for (int64_t h = 0; h < heads; ++h) {
        const S by = scale == nullptr ? inverse[i] : inverse[i] * scale[h], back = by * inverse[i] * along[i];
        turn_back(x.at(column, h), dy.at(column, h), block_cos, block_sin, size, by, back, dx.at(column, h));
        block_cos += size.half, block_sin += size.half, ++i;
      }
  }
}

template <class T, class Size>
void forward(const CosineRopeForward& args, Size size, int threads) {
  using S = Scalar<T>;
  const CosineRope& a = args.inputs;
  const S* scale = static_cast<const S*>(a.cosine_scale);
  for_each_piece<S>(a, Pieces(a), size, threads, [&](const Piece& piece, const Turns<S>& turns, S* scratch) {
    const Heads<T> q_prepared(args.q_prepared, piece, a.heads, a.dim), k_prepared(args.k_prepared, piece, a.heads, a.dim);
    forward_side(a, piece, Heads<const T>(a.q, piece), turns, size, scale, scratch, q_prepared);
    forward_side(a, piece, Heads<const T>(a.k, piece), turns, size, static_cast<const S*>(nullptr), scratch, k_prepared);
  });
}

template <class T, class Size>
void backward(const CosineRopeBackward& args, Size size, int threads) {
  using S = Scalar<T>;
  const CosineRope& a = args.inputs;
  const S* scale = static_cast<const S*>(a.cosine_scale);
  S* dscale = static_cast<S*>(args.dcosine_scale);
  const Pieces pieces(a);
  const Scratch<double> sums(dscale == nullptr ? 0 : pieces.count * a.heads);
  for_each_piece<S>(a, pieces, size, threads, [&](const Piece& piece, const Turns<S>& turns, S* scratch) {
    const Heads<T> dq(args.dq, piece, a.heads, a.dim), dk(args.dk, piece, a.heads, a.dim);
    double* sum = dscale == nullptr ? nullptr : sums.get() + piece.number * a.heads;
    for (int64_t h = 0; sum != nullptr && h < a.heads; ++h) sum[h] = 0;
    if (dq.first != nullptr || sum != nullptr)
      backward_side(a, piece, Heads<const T>(a.q, piece), Heads<const T>(args.dq_prepared, piece), turns, size, scale, scratch,
                    dq, sum);
    if (dk.first != nullptr)
      backward_side(a, piece, Heads<const T>(a.k, piece), Heads<const T>(args.dk_prepared, piece), turns, size,
                    static_cast<const S*>(nullptr), scratch, dk, nullptr);
  });
  for (int64_t h = 0; dscale != nullptr && h < a.heads; ++h) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces.count; ++piece) sum += sums.get()[piece * a.heads + h];
    dscale[h] = S(sum);
  }
}

}  // namespace

template <class InstructionSet>
void cosine_rope_forward(const CosineRopeForward& args, int threads) {
  with_element_type(args.inputs.dtype, [&](auto element) {
    with_size(args.inputs, [&](auto size) { forward<decltype(element)>(args, size, threads); });
  });
}

template <class InstructionSet>
void cosine_rope_backward(const CosineRopeBackward& args, int threads) {
  with_element_type(args.inputs.dtype, [&](auto element) {
    with_size(args.inputs, [&](auto size) { backward<decltype(element)>(args, size, threads); });
  });
}

template void cosine_rope_forward<Native>(const CosineRopeForward&, int);
template void cosine_rope_backward<Native>(const CosineRopeBackward&, int);

}  // namespace hdit
