// The forward pass of the fast path: see strips.h for how it goes.
#include "strips.h"

namespace hdit {
namespace {

// Of R rows of queries against one row of keys, results[j][offset][column]: with a known bound of the logits 2^(logit − bound)
// and their running sum in `running`, else the logits and their running maximum. Logits are times log2(e).
template <int R, int C, bool kBounded, class E, class S>
__attribute__((noinline)) void logits(const E* const* queries, const S* const* factors, const E* keys, const S* lengths,
                                      const S* visible, int64_t width, int64_t dim, int64_t groups, int64_t first, S bound,
                                      S* const* results, S* const* running) {
  for (int64_t column = 0; column < groups * kLanes<S>; column += kLanes<S>) {
    Vector<S> sums[R][C];
    const E* q[R];
    UNROLLED for (int j = 0; j < R; ++j) q[j] = queries[j] + column;
    if constexpr (kPerElement<E> == 1) products_in_parts<E, R, C>(q, keys + first + column, width, dim, sums);
    else products<E, R, C>(q, keys + first + column, width, dim, sums);  // whose rounding is bfloat16's anyway
    UNROLLED for (int j = 0; j < R; ++j) {
      const Vector<S> factor = load(factors[j] + column, Full{});
      Vector<S> total = load(running[j] + column, Full{});
      UNROLLED for (int i = 0; i < C; ++i) {
        Vector<S> result = sums[j][i] * load(lengths + first + column + i, Full{}) * factor;
        if (kBounded) result = exp2(result - bound);
        if (visible != nullptr) {
          const Vector<S> hidden = Vector<S>{} - (kBounded ? S(0) : S(INFINITY));
          result = (load(visible + first + column + i, Full{}) != 0) ? result : hidden;
        }
        if (kBounded) total += result;
        else total = (result > total) ? result : total;
        store(results[j] + (first + i) * kStrip + column, result, Full{});
      }
      store(running[j] + column, total, Full{});
    }
  }
}

// logits to 2^(logit − top) in place, for one vector of queries; returns their sum.
template <class S>
INLINE Vector<S> exponentials(S* logits, int64_t keys, Vector<S> top) {
  top = (top == -S(INFINITY)) ? Vector<S>{} : top;  // a query without any key
  Vector<S> sum = {};
  for (int64_t i = 0; i < keys * kStrip; i += kStrip) {
    const Vector<S> e = exp2(load(logits + i, Full{}) - top);
    sum += e;
    store(logits + i, e, Full{});
  }
  return sum;
}

#if defined(__AVX512BF16__)
// weights of `rows` rows of the image from `low` on, in pairs of rows, (0, 1), (2, 3), …; one outside the window weighs nothing.
INLINE void pair_rows(const float* weights, Pair* pairs, int64_t low, int64_t rows, int64_t kernel) {
  for (int64_t m = -(low % 2); m < rows; m += 2)
    for (int64_t n = 0; n < kernel; ++n, pairs += kStrip) {
      const float* weight = weights + (m * kernel + n) * kStrip;
      const UintVector even = m < 0 ? UintVector{} : rounded(load(weight, Full{}));
      const UintVector odd = m + 1 >= rows ? UintVector{} : rounded(load(weight + kernel * kStrip, Full{}));
      store(pairs, even | odd << 16);
    }
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
  Scratch<S> logits_, running, inverse, lse, visible_;  // logits, then weights
  Scratch<E> pairs_;                                     // of weights, where rings hold pairs
  Scratch<const E*> weights_seen_, values_seen_;
  Prefetch prefetch;

  explicit Forward(const Call<S>& c)
      : call(c), a(c.a), slots(ring_rows(c)), value_slots((slots - 1) / kPack + kPack),
        window_rows((a.rows.kernel - 1) / kPack + kPack), together(heads_together(c)), reader(c), columns(a.columns),
        keys_(together * slots * a.dim / kPack * c.width), values_(together * value_slots * c.width * a.v_dim),
        queries_(together * kForwardRows * a.dim / kPack * kStrip), lengths_(together * slots * c.width),
        factors_(together * kForwardRows * kStrip), logits_(kForwardRows * a.rows.kernel * a.columns.kernel * kStrip),
        running(kForwardRows * kStrip), inverse(kForwardRows * kStrip), lse(kForwardRows * kStrip),
        visible_(a.key_mask ? slots * c.width : 0), pairs_(kPack > 1 ? kForwardRows * window_rows * a.columns.kernel * kStrip : 0),
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
  E* row_weights(int64_t j, int64_t m) const {
    if constexpr (kPack == 1) return row_logits(j, m);
    else return pairs_.get() + (j * window_rows + m) * a.columns.kernel * kStrip;
  }
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
  template <int R, bool kBounded>
  void attend_to_row(const Axis& rows, int64_t i, int64_t n, int64_t j, int64_t y, S bound) {
    const E* q[R];
    const S* f[R];
    S *l[R], *t[R];
    for (int m = 0; m < R; ++m) {
      q[m] = queries(n, j + m), f[m] = factors(n, j + m), t[m] = running.get() + (j + m) * kStrip;
      l[m] = row_logits(j + m, y - rows.low(i + j + m));
    }
    const int64_t slot = y % slots;
    for_each_offsets(a.columns.kernel, [&](auto offsets, int64_t first) INLINED {
      logits<R, decltype(offsets)::value, kBounded>(q, f, keys(n, slot), lengths(n, slot), visible(slot), call.width,
                                                    a.dim / kPack, columns.groups, first, bound, l, t);
    });
  }

  // The logits, or the weights, of rows [i, i + count) of queries of the n-th loaded head.
  template <bool kBounded>
  void attend_to_rows(const Axis& rows, int64_t i, int64_t count, int64_t n, S bound) {
    for (int64_t c = 0; c < count * kStrip; ++c) running.get()[c] = kBounded ? S(0) : -S(INFINITY);
    for (int64_t y = rows.low(i); y < rows.low(i + count - 1) + rows.kernel; ++y) {
      int64_t first = 0, last = count - 1;  // rows of queries that see row y
      while (y >= rows.low(i + first) + rows.kernel) ++first;
      while (y < rows.low(i + last)) --last;
      switch (last - first + 1) {
        case 1: attend_to_row<1, kBounded>(rows, i, n, first, y, bound); break;
        case 2: attend_to_row<2, kBounded>(rows, i, n, first, y, bound); break;
        case 3: attend_to_row<3, kBounded>(rows, i, n, first, y, bound); break;
      }
    }
  }

  // Outputs and lse of these rows. A bound of the logits in place of their maximum saves a pass over them.
  void attend(const Axis& rows, int64_t b, int64_t i, int64_t count, int64_t n, int64_t head) {
    const S factor = logit_factor<S>(a, head), bound = (factor < 0 ? -factor : factor) * S(kLog2E);
    const bool bounded = call.cosine && bound <= kBoundedFactor * S(kLog2E);
    if (bounded) attend_to_rows<true>(rows, i, count, n, bound);
    else attend_to_rows<false>(rows, i, count, n, 0);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t c = 0; c < columns.groups * kL; c += kL) {
        const Vector<S> total = load(running.get() + j * kStrip + c, Full{});
        const Vector<S> sum = bounded ? total : exponentials(row_logits(j, 0) + c, rows.kernel * a.columns.kernel, total);
        if constexpr (kPack > 1)
          pair_rows(row_logits(j, 0) + c, row_weights(j, 0) + c, rows.low(i + j), rows.kernel, a.columns.kernel);
        store(inverse.get() + j * kStrip + c, (sum == 0) ? Vector<S>{} : S(1) / sum, Full{});
        store(lse.get() + j * kStrip + c, log(sum) + (bounded ? Vector<S>{} + bound : total) * S(kLn2), Full{});
      }
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
    const int64_t from = rows.low(begin * kForwardRows);
    int64_t have = from;  // rows of keys in the rings: up to this one
    for (int64_t i = begin * kForwardRows; i < smaller(rows.length, end * kForwardRows); i += kForwardRows) {
      const int64_t queries = smaller(kForwardRows, rows.length - i);
      for (; have < rows.low(i + queries - 1) + rows.kernel; ++have) load_keys(rows, b, have, head, count, have == from);
      for (int64_t j = 0; j < queries; ++j) load_queries(rows, b, i + j, j, head, count);
      look_ahead(rows, axis, b, i, have, head, count);
      for (int64_t n = 0; n < count; ++n) attend(rows, b, i, queries, n, head + n);
    }
  }
};

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

#if defined(__AVX512BF16__)
// Products of pairs round turned queries and keys to bfloat16 once more, a 2⁻⁹th of each feature: of steep logits that is too
// much. Tokens that do not turn are not rounded.
inline bool rounds_little(const NeighborhoodAttention& a) {
  if (a.angles == 0) return true;
  for (int64_t h = 0; h < a.heads; ++h)
    if (a.cosine_scale == nullptr || !(std::fabs(logit_factor<float>(a, h)) <= kBoundedFactor)) return false;
  return true;
}
#endif

}  // namespace

#if defined(__AVX512BF16__)
// Of this instruction set only what AVX-512 has not: the forward pass of bfloat16.
template <>
bool neighborhood_attention_strips_forward<Avx512Bf16>(const NeighborhoodAttention& args, int threads) {
  if (args.dtype != DType::bfloat16 || !fits(args) || !rounds_little(args)) return false;
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

template bool neighborhood_attention_strips_forward<Native>(const NeighborhoodAttention&, int);
#endif

}  // namespace hdit
