#include "cosine_rope.h"

namespace hdit {
namespace {

constexpr double kEps = 1e-6;  // in the lengths of q and k, as in the reference

// Rows are cut into pieces of so many elements at most: a single row can occupy every thread, and what a piece needs of
// cosines and sines stays in the cache. The cut depends on the shape alone, and so do the sums over a piece.
constexpr int64_t kElementsPerPiece = 8192;

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

  void move_to(int64_t row, int64_t column, int64_t columns) {
    if (column != column_) copy(columns_, column, 1, a_.angles, columns);
    if (column != column_ || row != row_) copy(rows_, row, 0, 0, columns);
    row_ = row, column_ = column;
  }

  const S* cos(int64_t column, int64_t head) const { return cos_.get() + (column * a_.heads + head) * 2 * a_.angles; }
  const S* sin(int64_t column, int64_t head) const { return sin_.get() + (column * a_.heads + head) * 2 * a_.angles; }

 private:
  void copy(const Rotations<S>& from, int64_t first, int64_t step, int64_t offset, int64_t columns) {
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t h = 0; h < a_.heads; ++h) {
        const int64_t source = ((first + x * step) * a_.heads + h) * a_.angles;
        const int64_t target = (x * a_.heads + h) * 2 * a_.angles + offset;
        for_each_vector<S>(a_.angles, [&](int64_t i, auto part) {
          store(cos_.get() + target + i, load(from.cos.get() + source + i, part), part);
          store(sin_.get() + target + i, load(from.sin.get() + source + i, part), part);
        });
      }
  }

  const CosineRope& a_;
  const Rotations<S>&rows_, &columns_;
  Scratch<S> cos_, sin_;
  int64_t row_ = -1, column_ = -1;
};

// ---- one head of one token -----------------------------------------------------------------------------------------------
// y = factor · R(x / length)
template <class T>
inline void prepare(const T* x, const Scalar<T>* cos, const Scalar<T>* sin, int64_t dim, int64_t half, Scalar<T> factor, T* y) {
  Vector<T> squares = {};
  for_each_vector<T>(dim, [&](int64_t i, auto part) {
    const auto v = load(x + i, part);
    squares += v * v;
  });
  const Scalar<T> by = factor / std::sqrt(sum_lanes(squares) + Scalar<T>(kEps));
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

// With d the gradient dy turned back and n = 1 / length: dx = factor · (n·d − n³·x·(x·d)), at dx unless that is null. Returns
// n·(x·d), the gradient of factor.
template <class T>
inline Scalar<T> prepare_backward(const T* x, const T* dy, const Scalar<T>* cos, const Scalar<T>* sin, int64_t dim, int64_t half,
                                  Scalar<T> factor, T* dx) {
  Vector<T> squares = {}, along = {};
  for_each_vector<T>(half, [&](int64_t i, auto part) {
    const auto a = load(x + i, part), b = load(x + half + i, part);
    const auto da = load(dy + i, part), db = load(dy + half + i, part);
    const auto c = load(cos + i, part), s = load(sin + i, part);
    squares += a * a + b * b;
    along += a * (da * c + db * s) + b * (db * c - da * s);
  });
  for_each_vector<T>(dim - 2 * half, [&](int64_t i, auto part) {
    const auto v = load(x + 2 * half + i, part);
    squares += v * v;
    along += v * load(dy + 2 * half + i, part);
  });
  const Scalar<T> inverse = 1 / std::sqrt(sum_lanes(squares) + Scalar<T>(kEps)), cosine = sum_lanes(along) * inverse;
  if (dx == nullptr) return cosine;
  const Scalar<T> by = factor * inverse, back = by * inverse * cosine;
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
  return cosine;
}

// ---- all tokens ----------------------------------------------------------------------------------------------------------
struct Pieces {
  int64_t columns, per_row, count;

  explicit Pieces(const CosineRope& a) {
    const int64_t fit = kElementsPerPiece / (a.heads * a.dim);
    columns = fit < 1 ? 1 : fit < a.width ? fit : a.width;
    per_row = (a.width + columns - 1) / columns;
    count = per_row * a.height * a.batch;
  }
};

// body(piece, turns, image, row, first column, columns) over all pieces of all rows; pieces below each other in turn.
template <class S, class Body>
inline void for_each_piece(const CosineRope& a, const Pieces& pieces, int threads, Body body) {
  const Rotations<S> rows(a.height_angles, a.angles_dtype, a.height * a.heads * a.angles);
  const Rotations<S> columns(a.width_angles, a.angles_dtype, a.width * a.heads * a.angles);
  const int64_t elements = 2 * a.batch * a.height * a.width * a.heads * a.dim;
  parallel_for(pieces.count, useful_threads(elements, threads), [&](int64_t begin, int64_t end) {
    Turns<S> turns(a, rows, columns, pieces.columns);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t image = piece % a.batch, row = piece / a.batch % a.height;
      const int64_t column = piece / a.batch / a.height * pieces.columns;
      const int64_t count = a.width - column < pieces.columns ? a.width - column : pieces.columns;
      turns.move_to(row, column, count);
      body(piece, turns, image, row, column, count);
    }
  });
}

template <class T>
inline const T* at(const Tokens& t, int64_t image, int64_t row, int64_t column, int64_t head) {
  return static_cast<const T*>(t.data) + image * t.batch_stride + row * t.height_stride + column * t.width_stride +
         head * t.head_stride;
}

inline bool empty(const CosineRope& a) { return a.batch * a.height * a.width * a.heads * a.dim == 0; }

template <class T>
void forward(const CosineRopeForward& args, int threads) {
  using S = Scalar<T>;
  const CosineRope& a = args.inputs;
  if (empty(a)) return;
  const S* scale = static_cast<const S*>(a.cosine_scale);
  for_each_piece<S>(a, Pieces(a), threads,
                    [&](int64_t, const Turns<S>& turns, int64_t image, int64_t row, int64_t column, int64_t columns) {
    const int64_t first = ((image * a.height + row) * a.width + column) * a.heads * a.dim;
    T* q_prepared = static_cast<T*>(args.q_prepared) + first;
    T* k_prepared = static_cast<T*>(args.k_prepared) + first;
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t to = (x * a.heads + h) * a.dim;
        const S *cos = turns.cos(x, h), *sin = turns.sin(x, h);
        prepare(at<T>(a.q, image, row, column + x, h), cos, sin, a.dim, 2 * a.angles, scale[h], q_prepared + to);
        prepare(at<T>(a.k, image, row, column + x, h), cos, sin, a.dim, 2 * a.angles, S(1), k_prepared + to);
      }
  });
}

template <class T>
void backward(const CosineRopeBackward& args, int threads) {
  using S = Scalar<T>;
  const CosineRope& a = args.inputs;
  S* dscale = static_cast<S*>(args.dcosine_scale);
  if (empty(a)) {
    for (int64_t h = 0; dscale != nullptr && h < a.heads; ++h) dscale[h] = 0;  // a sum over no tokens
    return;
  }
  const S* scale = static_cast<const S*>(a.cosine_scale);
  const Pieces pieces(a);
  const Scratch<double> sums(dscale == nullptr ? 0 : pieces.count * a.heads);
  for_each_piece<S>(a, pieces, threads, [&](int64_t piece, const Turns<S>& turns, int64_t image, int64_t row, int64_t column,
                                            int64_t columns) {
    const int64_t first = ((image * a.height + row) * a.width + column) * a.heads * a.dim;
    T* dq = args.dq == nullptr ? nullptr : static_cast<T*>(args.dq) + first;
    T* dk = args.dk == nullptr ? nullptr : static_cast<T*>(args.dk) + first;
    double* sum = dscale == nullptr ? nullptr : sums.get() + piece * a.heads;
    for (int64_t h = 0; sum != nullptr && h < a.heads; ++h) sum[h] = 0;
    for (int64_t x = 0; x < columns; ++x)
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t to = (x * a.heads + h) * a.dim;
        const S *cos = turns.cos(x, h), *sin = turns.sin(x, h);
        if (dq != nullptr || sum != nullptr) {
          const S term = prepare_backward(at<T>(a.q, image, row, column + x, h),
                                          at<T>(args.dq_prepared, image, row, column + x, h), cos, sin, a.dim, 2 * a.angles,
                                          scale[h], dq == nullptr ? nullptr : dq + to);
          if (sum != nullptr) sum[h] += double(term);
        }
        if (dk != nullptr)
          prepare_backward(at<T>(a.k, image, row, column + x, h), at<T>(args.dk_prepared, image, row, column + x, h), cos,
                           sin, a.dim, 2 * a.angles, S(1), dk + to);
      }
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
  with_element_type(args.inputs.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}

template <class InstructionSet>
void cosine_rope_backward(const CosineRopeBackward& args, int threads) {
  with_element_type(args.inputs.dtype, [&](auto element) { backward<decltype(element)>(args, threads); });
}

template void cosine_rope_forward<Native>(const CosineRopeForward&, int);
template void cosine_rope_backward<Native>(const CosineRopeBackward&, int);

}  // namespace hdit
