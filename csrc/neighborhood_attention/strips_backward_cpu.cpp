// The backward pass of the fast path: see strips.h for how it goes.
//
// From q, k, v, dout and lse: the weights again, then dq of the rows of queries at work and dk, dv of the rows of keys whose
// queries have all been seen. Every gradient is written once, by one thread, in one order.
#include "strips.h"

namespace hdit {
namespace {

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
        carried(strips_of<S>(c.columns(0)) > 1 ? most_rows * kernel * sums_dim : 0), gradient(kMostSums * a.dim),
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
      for (int64_t n = 0; n < kernel * kStrip; n += kStrip, ++length) {
        const Vector<S> weight = load(w + n, Full{}) * inverse, dlogit = weight * (load(dw + n, Full{}) - delta);
        store(w + n, weight, Full{});
        store(dw + n, dlogit * (query_length * load(length, Full{})), Full{});
        add_widened(dfactor, dlogit * load(cosine + n, Full{}));
      }
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

template <class InstructionSet>
bool neighborhood_attention_strips_backward(const NeighborhoodAttentionBackward& args, int threads) {
  if (!fits_backward(args.forward)) return false;
  with_element_type(args.forward.dtype, [&](auto element) { backward<decltype(element)>(args, threads); });
  return true;
}

template bool neighborhood_attention_strips_backward<Native>(const NeighborhoodAttentionBackward&, int);

}  // namespace hdit
