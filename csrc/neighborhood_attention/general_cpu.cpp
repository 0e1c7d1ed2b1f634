// The general path: every window, size, layout and option. One (image, head) at a time, keys and values of the rows that a
// tile of queries sees are prepared once (normalised, rotated, widened) and lie token by token in a buffer of a few rows.
#include "neighborhood_attention.h"

#include <cmath>

namespace hdit {
namespace {

constexpr int64_t kRowsPerTile = 16;  // of queries; the rows of keys prepared again for each tile are its overhead

// The keys of one query along a dimension: first + dilation·j for 0 <= j < count.
struct Range {
  int64_t first, count;
};

inline Range keys_of(const Window& w, int64_t i) {
  const int64_t group = i % w.dilation, place = i / w.dilation;
  const int64_t size = (w.length - group + w.dilation - 1) / w.dilation;
  int64_t leader = place / w.stride * w.stride + (w.causal ? w.stride - 1 : w.stride / 2);
  leader = smaller(leader, size - 1);
  if (w.causal) {
    const int64_t low = larger(leader - w.kernel + 1, 0);
    return {group + w.dilation * low, place + 1 - low};
  }
  const int64_t low = smaller(larger(leader - w.kernel / 2, 0), size - w.kernel);
  return {group + w.dilation * low, w.kernel};
}

template <class S>
inline S dot(const S* a, const S* b, int64_t n) {
  Vector<S> sum = {};
  for_each_vector<S>(n, [&](int64_t i, auto part) { sum += load(a + i, part) * load(b + i, part); });
  return sum_lanes(sum);
}

// y += factor·x
template <class S>
inline void add(S* y, const S* x, S factor, int64_t n) {
  for_each_vector<S>(n, [&](int64_t i, auto part) { store(y + i, load(y + i, part) + load(x + i, part) * factor, part); });
}

template <class S>
inline void fill(S* y, S value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = value;
}

template <class T>
inline void widen_token(const T* x, Scalar<T>* y, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, auto part) { store(y + i, load(x + i, part), part); });
}

template <class T>
inline void narrow_token(const Scalar<T>* x, T* y, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, auto part) { store(y + i, load(x + i, part), part); });
}

// exp(x − top) in place and the sum of the results.
inline float exponentials(float* x, float top, int64_t n) {
  FloatVector sum = {};
  for_each_vector<float>(n, [&](int64_t i, auto part) {
    const FloatVector shifted = load(x + i, part) - top;
    const FloatVector value = exp((shifted < -88.0f) ? FloatVector{} - 88.0f : shifted);
    store(x + i, (shifted < -87.0f) ? FloatVector{} : value, part);
  });
  for_each_vector<float>(n, [&](int64_t i, auto part) { sum += load(x + i, part); });
  return sum_lanes(sum);
}

inline double exponentials(double* x, double top, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - top);
  return sum;
}

// The largest of n values, −∞ of none, and a NaN if there is one.
template <class S>
inline S largest(const S* x, int64_t n) {
  S top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  return top;
}

// cos and sin of all angles, (length, heads, angles) each.
template <class S>
struct Rotations {
  Scratch<S> cos, sin;
  Rotations(const void* angles, int64_t count) : cos(count), sin(count) {
    for (int64_t i = 0; i < count; ++i) {
      cos.get()[i] = std::cos(static_cast<const S*>(angles)[i]);
      sin.get()[i] = std::sin(static_cast<const S*>(angles)[i]);
    }
  }
};

template <class S>
struct Positions {
  Rotations<S> rows, columns;
  int64_t heads, angles;
  explicit Positions(const NeighborhoodAttention& a)
      : rows(a.height_angles, a.rows.length * a.heads * a.angles),
        columns(a.width_angles, a.columns.length * a.heads * a.angles), heads(a.heads), angles(a.angles) {}

  // Features i and i + 2r of token (y, x) by the row's angle for i < r and the column's for r <= i < 2r; sign −1 turns back.
  void turn(S* token, int64_t y, int64_t x, int64_t h, S sign) const {
    for (int axis = 0; axis < 2; ++axis) {
      const Rotations<S>& table = axis == 0 ? rows : columns;
      const int64_t first = ((axis == 0 ? y : x) * heads + h) * angles;
      S *a = token + axis * angles, *b = a + 2 * angles;
      for (int64_t i = 0; i < angles; ++i) {
        const S c = table.cos.get()[first + i], s = table.sin.get()[first + i] * sign, u = a[i], w = b[i];
        a[i] = u * c - w * s;
        b[i] = w * c + u * s;
      }
    }
  }
};

// 1 / length of a token, or 1 without cosine similarity.
template <class S>
inline S inverse_length(const NeighborhoodAttention& a, const S* token) {
  return a.cosine_scale == nullptr ? S(1) : S(1) / std::sqrt(dot(token, token, a.dim) + S(kEps));
}

// A query or a key, widened, divided by its length, turned and times `factor`, at y. Returns 1 / length.
template <class T>
inline Scalar<T> prepare(const NeighborhoodAttention& a, const Positions<Scalar<T>>& positions, const T* token, int64_t y,
                         int64_t x, int64_t h, bool turned, Scalar<T> factor, Scalar<T>* result) {
  widen_token(token, result, a.dim);
  const Scalar<T> inverse = inverse_length(a, result);
  for (int64_t i = 0; i < a.dim; ++i) result[i] *= inverse * factor;
  if (turned) positions.turn(result, y, x, h, 1);
  return inverse;
}

// The gradient `d` of a prepared token becomes that of the raw token at `result`: turn back, then for x̂ = n·x with
// n = rsqrt(x² + eps), dx = n·dx̂ − n³·x·(x·dx̂), all times `factor`.
template <class T>
inline void unprepare(const NeighborhoodAttention& a, const Positions<Scalar<T>>& positions, const T* token, int64_t y,
                      int64_t x, int64_t h, bool turned, Scalar<T> factor, Scalar<T>* d, Scalar<T>* raw, T* result) {
  if (turned) positions.turn(d, y, x, h, -1);
  if (a.cosine_scale != nullptr) {
    widen_token(token, raw, a.dim);
    const Scalar<T> inverse = inverse_length(a, raw), along = dot(raw, d, a.dim) * inverse;
    for (int64_t i = 0; i < a.dim; ++i) d[i] = (d[i] - raw[i] * inverse * along) * inverse;
  }
  for (int64_t i = 0; i < a.dim; ++i) d[i] *= factor;
  narrow_token(d, result, a.dim);
}

// Prepared keys and values of rows [first, last) of one (image, head), and of its extra tokens.
template <class T>
struct Slab {
  using S = Scalar<T>;
  const NeighborhoodAttention& a;
  int64_t first = 0, last = 0;
  Scratch<S> keys, values, extra_keys, extra_values;

  Slab(const NeighborhoodAttention& args, int64_t rows)
      : a(args), keys(rows * args.columns.length * args.dim), values(rows * args.columns.length * args.v_dim),
        extra_keys(args.extra * args.dim), extra_values(args.extra * args.v_dim) {}

  S* key(int64_t y, int64_t x) const { return keys.get() + ((y - first) * a.columns.length + x) * a.dim; }
  S* value(int64_t y, int64_t x) const { return values.get() + ((y - first) * a.columns.length + x) * a.v_dim; }

  bool attended(int64_t b, int64_t y, int64_t x) const {
    return a.key_mask == nullptr || a.key_mask[(b * a.rows.length + y) * a.columns.length + x];
  }

  void load_rows(const Positions<S>& positions, int64_t b, int64_t h, int64_t begin, int64_t end) {
    first = begin, last = end;
    for (int64_t y = begin; y < end; ++y)
      for (int64_t x = 0; x < a.columns.length; ++x) {
        if (!attended(b, y, x)) continue;  // never read: a hidden token may hold anything
        prepare(a, positions, at<T>(a.k, b, y, x, h), y, x, h, true, S(1), key(y, x));
        widen_token(at<T>(a.v, b, y, x, h), value(y, x), a.v_dim);
      }
  }

  void load_extra(const Positions<S>& positions, int64_t b, int64_t h) {
    for (int64_t s = 0; s < a.extra; ++s) {
      prepare(a, positions, at<T>(a.extra_k, b, 0, s, h), 0, 0, h, false, S(1), extra_keys.get() + s * a.dim);
      widen_token(at<T>(a.extra_v, b, 0, s, h), extra_values.get() + s * a.v_dim, a.v_dim);
    }
  }
};

// The prepared keys and values that one query attends to, extra tokens last, and the number of each among all tokens.
template <class S>
struct Attended {
  Scratch<const S*> keys, values;
  Scratch<int64_t> tokens;
  int64_t count = 0;
  explicit Attended(int64_t most) : keys(most), values(most), tokens(most) {}

  void push(const S* key, const S* value, int64_t token) {
    keys.get()[count] = key, values.get()[count] = value, tokens.get()[count] = token;
    ++count;
  }

  template <class T>
  void collect(const Slab<T>& slab, int64_t b, int64_t i, int64_t j) {
    const NeighborhoodAttention& a = slab.a;
    const Range rows = keys_of(a.rows, i), columns = keys_of(a.columns, j);
    count = 0;
    for (int64_t m = 0; m < rows.count; ++m)
      for (int64_t n = 0; n < columns.count; ++n) {
        const int64_t y = rows.first + m * a.rows.dilation, x = columns.first + n * a.columns.dilation;
        if (slab.attended(b, y, x)) push(slab.key(y, x), slab.value(y, x), y * a.columns.length + x);
      }
    for (int64_t s = 0; s < a.extra; ++s)
      push(slab.extra_keys.get() + s * a.dim, slab.extra_values.get() + s * a.v_dim, a.rows.length * a.columns.length + s);
  }
};

// result[k] = x·tokens[k]: four tokens at a time, so that x is read once for them and their sums do not wait on each other.
template <class S>
inline void products_with(const S* x, const S* const* tokens, int64_t count, int64_t dim, S* result) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    Vector<S> sums[4] = {};
    for_each_vector<S>(dim, [&](int64_t i, auto part) {
      const auto v = load(x + i, part);
      for (int t = 0; t < 4; ++t) sums[t] += v * load(tokens[k + t] + i, part);
    });
    for (int t = 0; t < 4; ++t) result[k + t] = sum_lanes(sums[t]);
  }
  for (; k < count; ++k) result[k] = dot(x, tokens[k], dim);
}

// result = Σ weights[k]·tokens[k], four vectors of the result at a time in registers.
template <class S>
inline void weighted_sum(const S* weights, const S* const* tokens, int64_t count, int64_t dim, S* result) {
  constexpr int64_t kBlock = 4 * kLanes<S>;
  int64_t d = 0;
  for (; d + kBlock <= dim; d += kBlock) {
    Vector<S> sums[4] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int v = 0; v < 4; ++v) sums[v] += weights[k] * load(tokens[k] + d + v * kLanes<S>, Full{});
    for (int v = 0; v < 4; ++v) store(result + d + v * kLanes<S>, sums[v], Full{});
  }
  for_each_vector<S>(dim - d, [&](int64_t i, auto part) {
    Vector<S> sum = {};
    for (int64_t k = 0; k < count; ++k) sum += weights[k] * load(tokens[k] + d + i, part);
    store(result + d + i, sum, part);
  });
}

// The rows of keys that queries of rows [begin, end) see.
inline Range rows_seen(const Window& w, int64_t begin, int64_t end) {
  int64_t low = w.length, high = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Range range = keys_of(w, i);
    low = smaller(low, range.first);
    high = larger(high, range.first + (range.count - 1) * w.dilation + 1);
  }
  return {low, high - low};
}

template <class T>
void forward_query(const Slab<T>& slab, const Positions<Scalar<T>>& positions, int64_t b, int64_t i, int64_t j, int64_t h,
                   Scalar<T>* query, Scalar<T>* logits, Scalar<T>* sum, Attended<Scalar<T>>& seen) {
  using S = Scalar<T>;
  const NeighborhoodAttention& a = slab.a;
  prepare(a, positions, at<T>(a.q, b, i, j, h), i, j, h, true, logit_factor<S>(a, h), query);
  seen.collect(slab, b, i, j);
  products_with(query, seen.keys.get(), seen.count, a.dim, logits);
  const S top = largest(logits, seen.count);
  const S total = exponentials(logits, top, seen.count);
  for (int64_t n = 0; n < seen.count; ++n) logits[n] /= total;
  weighted_sum(logits, seen.values.get(), seen.count, a.v_dim, sum);
  const int64_t token = ((b * a.rows.length + i) * a.columns.length + j) * a.heads + h;
  narrow_token(sum, static_cast<T*>(a.out) + token * a.v_dim, a.v_dim);
  static_cast<S*>(a.lse)[token] = seen.count > 0 ? top + std::log(total) : -INFINITY;
}

template <class T>
void forward(const NeighborhoodAttention& a, int threads) {
  using S = Scalar<T>;
  const int64_t height = a.rows.length, width = a.columns.length;
  const int64_t tiles = (height + kRowsPerTile - 1) / kRowsPerTile;
  const int64_t keys = a.rows.kernel * a.columns.kernel + a.extra;
  const Positions<S> positions(a);
  int64_t most = 0;
  for (int64_t t = 0; t < tiles; ++t)
    most = larger(most, rows_seen(a.rows, t * kRowsPerTile, smaller(height, (t + 1) * kRowsPerTile)).count);
  threads = useful_threads(a.batch * a.heads * height * width * keys, threads);
  parallel_for(a.batch * a.heads * tiles, threads, [&](int64_t begin, int64_t end) {
    Slab<T> slab(a, most);
    Attended<S> attended(keys);
    const Scratch<S> query(a.dim), logits(keys), sum(a.v_dim);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / tiles / a.heads, h = unit / tiles % a.heads, first = unit % tiles * kRowsPerTile;
      const int64_t last = smaller(height, first + kRowsPerTile);
      const Range seen = rows_seen(a.rows, first, last);
      slab.load_rows(positions, b, h, seen.first, seen.first + seen.count);
      slab.load_extra(positions, b, h);
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < width; ++j)
          forward_query<T>(slab, positions, b, i, j, h, query.get(), logits.get(), sum.get(), attended);
    }
  });
}

// Sums of one (image, head): gradients of prepared keys and of values, all tokens of the grid and then the extra ones.
template <class S>
struct Sums {
  Scratch<S> keys, values;
  int64_t tokens, count;
  Sums(const NeighborhoodAttention& a)
      : keys((a.rows.length * a.columns.length + a.extra) * a.dim),
        values((a.rows.length * a.columns.length + a.extra) * a.v_dim), tokens(a.rows.length * a.columns.length),
        count(tokens + a.extra) {}
};

// What one thread needs for one query after the other.
template <class S>
struct QueryScratch {
  Scratch<S> query, dquery, dout, raw, products, weights, dweights;
  Attended<S> seen;
  QueryScratch(const NeighborhoodAttention& a, int64_t keys)
      : query(a.dim), dquery(a.dim), dout(a.v_dim), raw(a.dim), products(keys), weights(keys), dweights(keys), seen(keys) {}
};

// dq of one query; what its keys and values get from it is added to `sums`. Returns its part of dcosine_scale.
template <class T>
double backward_query(const NeighborhoodAttentionBackward& g, const Slab<T>& slab, const Positions<Scalar<T>>& positions,
                      int64_t b, int64_t i, int64_t j, int64_t h, QueryScratch<Scalar<T>>& scratch,
                      Sums<Scalar<T>>& sums) {
  using S = Scalar<T>;
  const NeighborhoodAttention& a = g.forward;
  Attended<S>& seen = scratch.seen;
  S *query = scratch.query.get(), *dout = scratch.dout.get(), *products = scratch.products.get();
  S *weights = scratch.weights.get(), *dweights = scratch.dweights.get(), *dquery = scratch.dquery.get();
  const S factor = logit_factor<S>(a, h);
  // The query of unit length, without its factor, so that a factor of 0 has a gradient too.
  prepare(a, positions, at<T>(a.q, b, i, j, h), i, j, h, true, S(1), query);
  fill(dout, S(0), a.v_dim);
  if (g.dout.data != nullptr) widen_token(at<T>(g.dout, b, i, j, h), dout, a.v_dim);
  seen.collect(slab, b, i, j);
  products_with(query, seen.keys.get(), seen.count, a.dim, products);
  products_with(dout, seen.values.get(), seen.count, a.v_dim, dweights);
  for (int64_t n = 0; n < seen.count; ++n) weights[n] = products[n] * factor;
  // From the logits again and not from the lse, whose rounding would be every weight's.
  const S total = exponentials(weights, largest(weights, seen.count), seen.count);
  for (int64_t n = 0; n < seen.count; ++n) weights[n] /= total;
  // Σ weight·dweight is dout·out, here without the rounding that out has in half precision.
  const int64_t token = ((b * a.rows.length + i) * a.columns.length + j) * a.heads + h;
  const S dlse = g.dlse == nullptr ? S(0) : static_cast<const S*>(g.dlse)[token];
  const S delta = dot(weights, dweights, seen.count) - dlse;
  double dscale = 0;  // terms of both signs: in float32 their sum would lose more than they do
  for (int64_t n = 0; n < seen.count; ++n) {
    add(sums.values.get() + seen.tokens.get()[n] * a.v_dim, dout, weights[n], a.v_dim);
    dweights[n] = weights[n] * (dweights[n] - delta);  // from here on the gradient of the logit
    dscale += double(dweights[n]) * double(products[n]);
    add(sums.keys.get() + seen.tokens.get()[n] * a.dim, query, dweights[n] * factor, a.dim);
  }
  if (g.dq.data != nullptr) {
    weighted_sum(dweights, seen.keys.get(), seen.count, a.dim, dquery);
    T* dq = at<T>(g.dq, b, i, j, h);
    unprepare(a, positions, at<T>(a.q, b, i, j, h), i, j, h, true, factor, dquery, scratch.raw.get(), dq);
  }
  return dscale * a.scale;
}

// The sums of prepared keys and of values become dk, dv and the gradients of the extra tokens.
template <class T>
void write_sums(const NeighborhoodAttentionBackward& g, const Positions<Scalar<T>>& positions, int64_t b, int64_t h,
                Sums<Scalar<T>>& sums, const Slab<T>& slab, Scalar<T>* raw) {
  using S = Scalar<T>;
  const NeighborhoodAttention& a = g.forward;
  for (int64_t token = 0; token < sums.count; ++token) {
    const bool extra = token >= sums.tokens;
    const int64_t y = extra ? 0 : token / a.columns.length, x = extra ? token - sums.tokens : token % a.columns.length;
    const Tokens &dk = extra ? g.dextra_k : g.dk, &dv = extra ? g.dextra_v : g.dv;
    S *key = sums.keys.get() + token * a.dim, *value = sums.values.get() + token * a.v_dim;
    if (!extra && !slab.attended(b, y, x)) {  // hidden: zeros, whatever the token holds
      if (dk.data != nullptr) narrow_token(key, at<T>(dk, b, y, x, h), a.dim);
    } else if (dk.data != nullptr) {
      unprepare(a, positions, at<T>(extra ? a.extra_k : a.k, b, y, x, h), y, x, h, !extra, S(1), key, raw,
                at<T>(dk, b, y, x, h));
    }
    if (dv.data != nullptr) narrow_token(value, at<T>(dv, b, y, x, h), a.v_dim);
  }
}

template <class T>
void backward(const NeighborhoodAttentionBackward& g, int threads) {
  using S = Scalar<T>;
  const NeighborhoodAttention& a = g.forward;
  const int64_t height = a.rows.length, width = a.columns.length;
  const int64_t keys = a.rows.kernel * a.columns.kernel + a.extra;
  const Positions<S> positions(a);
  threads = useful_threads(a.batch * a.heads * height * width * keys, threads);
  // One (image, head) per thread: every sum has one order, so the bits do not depend on the number of threads.
  parallel_for(a.batch * a.heads, threads, [&](int64_t begin, int64_t end) {
    Slab<T> slab(a, height);
    Sums<S> sums(a);
    QueryScratch<S> scratch(a, keys);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / a.heads, h = unit % a.heads;
      slab.load_rows(positions, b, h, 0, height);
      slab.load_extra(positions, b, h);
      fill(sums.keys.get(), S(0), sums.count * a.dim);
      fill(sums.values.get(), S(0), sums.count * a.v_dim);
      double dscale = 0;
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j)
          dscale += backward_query<T>(g, slab, positions, b, i, j, h, scratch, sums);
      if (g.dcosine_scale != nullptr) static_cast<S*>(g.dcosine_scale)[unit] = S(dscale);
      write_sums<T>(g, positions, b, h, sums, slab, scratch.raw.get());
    }
  });
}

}  // namespace

template <class InstructionSet>
void neighborhood_attention_forward(const NeighborhoodAttention& args, int threads) {
  if (neighborhood_attention_strips_forward<InstructionSet>(args, threads)) return;
  with_element_type(args.dtype, [&](auto element) { forward<decltype(element)>(args, threads); });
}

template <class InstructionSet>
void neighborhood_attention_backward(const NeighborhoodAttentionBackward& args, int threads) {
  if (neighborhood_attention_strips_backward<InstructionSet>(args, threads)) return;
  with_element_type(args.forward.dtype, [&](auto element) { backward<decltype(element)>(args, threads); });
}

template void neighborhood_attention_forward<Native>(const NeighborhoodAttention&, int);
template void neighborhood_attention_backward<Native>(const NeighborhoodAttentionBackward&, int);

}  // namespace hdit
