// Forward pass of neighborhood attention on tensor cores for stride 1, dilation 1, not causal (see strips.cuh first).
//
// A block owns 8 × warps columns of one head and marches down the rows, `step` rows of queries at a time. Keys and values
// of the rows that they see, and of the next step's, lie in two rings in shared memory: each is fetched once per strip,
// and its key normalised and rotated once. While a step is computed, the next one's keys and values arrive (cp.async),
// and its keys are prepared in place, between the products. One barrier a step.
//
// A warp owns `tiles` tiles of 2 rows × 8 columns of queries, one below the other. To them a row of keys is 16 columns,
// of which 8 + window − 1 are seen: products of 16 queries with 2 × 8 keys, weights of what is seen, and products with 16
// values, whose fragments serve all tiles. The sum of a query's weights, as rounded, is one more product, with ones.
//
// With cosine_scale no logit exceeds |scale · cosine_scale|: unless that is steep (`kBound`), weights are exp2 of what
// comes out of the product, without any maximum. Else they are relative to a maximum that is raised when a logit exceeds
// it by more than `kSlack`, which is rare: only then are sums rescaled.
//
// Unit queries and keys are float16 numbers, which puts errors of up to 2e-4 · |cosine_scale| into logits: less than the
// rounding of bfloat16 results up to |cosine_scale| of some 500, and than that of float16 ones up to some 80. Steep heads
// of float16 tensors (`kSplit`) are left to a second kernel, which `split`s each unit number into a sum of two.
//
// A NaN or an infinity in k or v may reach queries that do not see it, of tiles whose 16 columns of keys hold it: products
// multiply it by zero.
#include <algorithm>

#include "strips.cuh"

namespace hdit {
namespace {

using namespace strips;

constexpr float kSlack = 8;  // of logits to base 2: weights stay far below float16's 2^16

// Logits to base 2 up to which weights need no maximum: sums of exp2(57) times values are float32 numbers, exp2(15.5) is
// a float16 number and exp2(−15.5) almost a normal one.
template <class T>
constexpr float kBound = std::is_same_v<T, BFloat16> ? 57.0f : 15.5f;

// Logits to base 2 of float16 tensors from where on unit numbers are split. The backward pass does not split: below, its weights
// have the same roundings as lse, which takes their sum to one.
constexpr float kSplit = 83;

// What a kernel is compiled for. Windows of `window` rows, or `whole` false: up to so many; up to `window` columns.
// split: prepared queries and keys are sums of two float16 numbers.
template <class Element, bool is_cosine, int dim_, int window_, bool whole_, int tiles_, int warps_, bool split_ = false>
struct Strip {
  using T = Element;
  static constexpr bool cosine = is_cosine, whole = whole_, split = split_;
  static constexpr int parts = split ? 2 : 1;
  using Unit = Held<T, cosine>;
  static constexpr int dim = dim_, window = window_, tiles = tiles_, warps = warps_, threads = 32 * warps;
  static constexpr int step = 2 * tiles, live = step + window - 1, ring = live + step;  // rows: of queries, seen, held
  static constexpr int columns = kTileColumns * warps + window - 1, tokens = step * columns;  // of keys; of a step
  static constexpr int token_bytes = 2 * dim, row_bytes = columns * token_bytes, table_bytes = dim / 2;
  // Shared memory: the rings of keys and of values (and of second parts of keys), angles of columns, where a step's keys
  // and values come from and where they go, angles of rows; if split, all after the rings again: angles' second parts.
  static constexpr int values_at = ring * row_bytes, rests_at = 2 * values_at, column_angles_at = (1 + parts) * values_at;
  static constexpr int key_items_at = column_angles_at + columns * table_bytes;
  static constexpr int value_items_at = key_items_at + tokens * 8, row_angles_at = value_items_at + tokens * 8;
  static constexpr int more_rows = 2 * step - 1 + window - 1;  // of keys than of queries, in the last step and after it
  static constexpr int bytes(int rows) {
    return column_angles_at + parts * (row_angles_at - column_angles_at + (rows + more_rows) * table_bytes);
  }
  // The first rows are not a whole number of steps: so many before them are not loaded.
  static constexpr int skipped = ring % step;
  // A step's keys are prepared in rounds of threads / 4 tokens, some in each of the last rows of the step before.
  static constexpr int rounds = (tokens * 4 + threads - 1) / threads;
  static constexpr int rounds_per_row = (rounds + live - 3) / (live - 2);
  static constexpr int rounds_from = live - (rounds + rounds_per_row - 1) / rounds_per_row;
  static_assert(ring % 2 == 0 && (live + skipped) % step == 0 && rounds_from >= 2);
};

// Which of a lane's key columns 8n + 2t + e its queries' column g sees.
template <bool running>
struct Seen;
template <>
struct Seen<false> {
  uint32_t mask[2];  // of pairs of weights

  DEVICE Seen(int g, int t, int window) {
    const auto seen = [&](int column) { return column >= g && column < g + window; };
#pragma unroll
    for (int n = 0; n < 2; ++n)
      mask[n] = (seen(8 * n + 2 * t) ? 0xffffu : 0) | (seen(8 * n + 2 * t + 1) ? 0xffff0000u : 0);
  }
};
template <>
struct Seen<true> {
  float start[2][4];  // of logits: 0, or −inf

  DEVICE Seen(int g, int t, int window) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * n + 2 * t + e % 2;
        start[n][e] = column >= g && column < g + window ? 0.0f : -INFINITY;
      }
  }
};

template <class S>
struct Block {
  using T = typename S::T;
  static constexpr int dim = S::dim, words = dim / 8, fragments = dim / 16;

  const Args& args;
  uint32_t shared;
  int thread, warp, lane, g, t;  // g, t: row and column of a lane in a fragment; of a token's four lanes, t
  int head, first_column, first_row, rows;  // of queries
  int column;                               // of this lane's
  const char *q, *k, *v;                    // row 0 of the image; of q, this lane's column
  int64_t result;                           // the place in lse of this lane's query in row first_row

  DEVICE explicit Block(const Args& given) : args(given), shared(core::dynamic_shared()) {
    thread = threadIdx.x, warp = core::uniform(thread >> 5), lane = thread & 31, g = lane >> 2, t = lane & 3;
    const Place place = place_of(blockIdx.x, args);
    head = place.head;
    first_column = place.strip * kTileColumns * S::warps, first_row = place.segment * args.rows;
    rows = least(args.height - first_row, args.rows);
    column = first_column + kTileColumns * warp + g;
    q = image_of(args.q, place) + least(column, args.width - 1) * int64_t(args.q.width_stride);
    k = image_of(args.k, place), v = image_of(args.v, place);
    result = ((place.image * int64_t(args.height) + first_row) * args.width + column) * args.heads + head;
  }

  DEVICE int first_key_row() const { return first_row - args.window_rows / 2; }
  DEVICE int first_key_column() const { return first_column - args.window_columns / 2; }
  DEVICE int rest_of_angles() const {
    return S::split ? S::row_angles_at - S::column_angles_at + (args.rows + S::more_rows) * S::table_bytes : 0;
  }
  // Of row and column `row`, `column` of those keys.
  DEVICE Angles<dim> angles_at(int row, int column) const {
    const uint32_t at = angles_of<dim>(shared + S::row_angles_at, row, shared + S::column_angles_at, column, t);
    if constexpr (S::split) return load_angles<dim>(at, rest_of_angles());
    else return load_angles<dim>(at);
  }

  // ---- keys and values ----
  DEVICE void store_tables() const {
    store_angles<dim>(args, head, shared + S::row_angles_at, first_key_row(), rows + S::more_rows,
                      shared + S::column_angles_at, first_key_column(), S::columns, thread, S::threads, rest_of_angles());
#pragma unroll 1
    for (int i = thread; i < S::tokens; i += S::threads) {
      const int row = i / S::columns, column = i % S::columns;
      const uint32_t to = i * S::token_bytes + swizzle<dim>(column) * 16;  // < 2^16
      const int from = wrapped(first_key_column() + column, args.width, args.window_columns);
      const uint32_t key = row * int(args.k.height_stride) + from * args.k.width_stride;
      const uint32_t value = row * int(args.v.height_stride) + from * args.v.width_stride;
      core::store_shared<uint2>(shared + S::key_items_at + i * 8, uint2{key, to | column << 16 | row << 24});
      core::store_shared<uint2>(shared + S::value_items_at + i * 8, uint2{value, to});
    }
  }

  // Address in the ring of what lies `to` bytes from the first byte of `slot`.
  DEVICE int in_ring(int to, int slot) const {
    return to >= (S::ring - slot) * S::row_bytes ? to + slot * S::row_bytes - S::values_at : to + slot * S::row_bytes;
  }

  // Chunks `chunk`, `chunk` + lanes, … of a token, whose other chunks other lanes copy.
  template <int lanes>
  DEVICE void copy_token(uint32_t to, const char* from) const {
    const int chunk = thread & (lanes - 1);
    to ^= chunk << 4;
#pragma unroll
    for (int c = 0; c < words; c += lanes) core::copy_async_16(shared + (to ^ c << 4), from + (chunk + c) * 16);
  }

  // Asks for keys and values of a step: key rows first + skip … (0 is the first that this block sees); slot: `first`'s.
  // A key by the four lanes that prepare it.
  template <bool wraps>
  DEVICE void load_step(int first, int skip, int slot) const {
    const int row = first_key_row() + first;
    load_tokens<4, wraps>(k, args.k.height_stride, shared + S::key_items_at, row, skip, slot, 0);
    load_tokens<words, wraps>(v, args.v.height_stride, shared + S::value_items_at, row, skip, slot, S::values_at);
  }

  template <int lanes, bool wraps>
  DEVICE void load_tokens(const char* image, int64_t height_stride, uint32_t items, int row, int skip, int slot,
                          int at) const {
    constexpr int kAtOnce = S::threads / lanes, kRounds = (S::tokens + kAtOnce - 1) / kAtOnce;
    const char* from = image + row * height_stride;
    if constexpr (wraps) {
#pragma unroll 1
      for (int i = skip * S::columns + thread / lanes; i < S::tokens; i += kAtOnce) {
        const uint2 item = core::load_shared<uint2>(items + i * 8);
        const int here = row + i / S::columns, there = wrapped(here, args.height, args.window_rows);
        copy_token<lanes>(in_ring(item.y & 0xffff, slot) + at, from + item.x + (there - here) * height_stride);
      }
    } else {
      uint2 item[kRounds];  // all at once: their latencies overlap
#pragma unroll
      for (int n = 0; n < kRounds; ++n)
        item[n] = core::load_shared<uint2>(items + least(n * kAtOnce + thread / lanes, S::tokens - 1) * 8);
#pragma unroll
      for (int n = 0; n < kRounds; ++n)
        if ((n + 1) * kAtOnce <= S::tokens || n * kAtOnce + thread / lanes < S::tokens)
          copy_token<lanes>(in_ring(item[n].y & 0xffff, slot) + at, from + item[n].x);
    }
  }

  DEVICE void load_step(int first, int skip, int slot) const {
    const int row = first_key_row() + first;
    if (row >= 0 && row + S::step <= args.height && skip == 0) load_step<false>(first, skip, slot);
    else load_step<true>(first, skip, slot);
  }

  DEVICE int key_of_round(int round) const { return round * (S::threads / 4) + thread / 4; }

  // Prepares key i of a step in its place; by the four lanes that copied it, all of a warp together.
  DEVICE void prepare_key(int i, int first, int slot) const {
    const bool mine = S::tokens % (S::threads / 4) == 0 || i < S::tokens;
    const uint32_t item = core::load_shared<uint32_t>(shared + S::key_items_at + (mine ? i : 0) * 8 + 4);
    const int row = item >> 24, column = item >> 16 & 0xff;
    const uint32_t at = shared + in_ring(item & 0xffff, slot);
    Quarter<dim> raw = {};
    if (mine) raw = load_quarter_shared<dim>(at, t);
    core::sync_warp();
    float key[dim / 4], inverse_length;
    prepare<dim, T, S::cosine>(key, raw, angles_at(first + row, column), 1.0f, inverse_length);
    const Quarter<dim> rounded = packed<dim, typename S::Unit>(key);
    if (mine) store_prepared<dim>(at, t, rounded);
    if constexpr (S::split)
      if (mine) store_prepared<dim>(at + S::rests_at, t, left_over<dim>(key, rounded));
  }

  DEVICE void prepare_keys(int first, int skip, int slot) const {
    core::sync_warp();
#pragma unroll 1
    for (int i = skip * S::columns; i < S::tokens; i += S::threads / 4) prepare_key(i + thread / 4, first, slot);
  }

  // ---- queries ----
  DEVICE void load_queries(Quarter<dim> (&raw)[S::tiles][2], int row) const {
#pragma unroll
    for (int i = 0; i < S::step; ++i) {
      raw[i / 2][i % 2] = load_quarter<dim>(q + least(row + i, args.height - 1) * args.q.height_stride, t);
    }
  }

  // As operands: words 2j and 2j + 1 of two rows of queries are fragment j. done: rows of queries before these.
  DEVICE void prepare_queries(uint32_t (&queries)[S::parts][S::tiles][fragments][4],
                              const Quarter<dim> (&raw)[S::tiles][2], int done, float factor) const {
#pragma unroll
    for (int i = 0; i < S::step; ++i) {
      const int row = done + i + args.window_rows / 2, x = kTileColumns * warp + g + args.window_columns / 2;
      float query[dim / 4], inverse_length;
      prepare<dim, T, S::cosine>(query, raw[i / 2][i % 2], angles_at(row, x), factor, inverse_length);
      Quarter<dim> part[S::parts];
      part[0] = packed<dim, typename S::Unit>(query);
      if constexpr (S::split) part[1] = left_over<dim>(query, part[0]);
#pragma unroll
      for (int p = 0; p < S::parts; ++p)
#pragma unroll
        for (int c = 0; c < words; ++c) queries[p][i / 2][c / 2][i % 2 + 2 * (c % 2)] = part[p].word[c];
    }
  }

  // ---- the softmax ----
  // Of a tile: queries g of its first row (h = 0) and of its second (h = 1).
  struct Sums {
    float out[dim / 8][4], total[4];  // of weights times values, of weights; [2h], [2h + 1]: features 8c + 2t, + 1
    float top[2];                     // what logits are relative to, if there is a maximum
  };

  // Whether row `offset` − h of the window, counted from the tile's first row's first, is one.
  DEVICE bool row_seen(int offset, int h) const {
    return offset >= h && offset - h < (S::whole ? S::window : args.window_rows);
  }

  // Raises what logits are relative to, where one has come that exceeds it.
  DEVICE void raise(Sums& sums, const float (&logits)[2][4], int offset, float slope) const {
    float top[2];
    bool exceeds = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float(&left)[4] = logits[0], (&right)[4] = logits[1];
      top[h] = fmaxf(fmaxf(left[2 * h], left[2 * h + 1]), fmaxf(right[2 * h], right[2 * h + 1])) * slope;
      if (offset == h) {  // the first
        top[h] = fmaxf(top[h], core::shuffle_xor(top[h], 1));
        sums.top[h] = fmaxf(top[h], core::shuffle_xor(top[h], 2));
      } else if (row_seen(offset, h)) {
        exceeds = exceeds || top[h] > sums.top[h] + kSlack;
      }
    }
    if (offset == 0 || !core::any(exceeds)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (offset == h || !row_seen(offset, h)) continue;
      top[h] = fmaxf(top[h], core::shuffle_xor(top[h], 1));
      top[h] = fmaxf(fmaxf(top[h], core::shuffle_xor(top[h], 2)), sums.top[h]);
      const float shrink = core::exp2(sums.top[h] - top[h]);
      sums.top[h] = top[h];
      sums.total[2 * h] *= shrink, sums.total[2 * h + 1] *= shrink;
#pragma unroll
      for (int c = 0; c < dim / 8; ++c) sums.out[c][2 * h] *= shrink, sums.out[c][2 * h + 1] *= shrink;
    }
  }

  // Logits of a tile with 2 x 8 keys become weights, as an operand.
  template <bool running>
  DEVICE void weigh(uint32_t (&weights)[4], Sums& sums, const uint32_t (&queries)[S::parts][S::tiles][fragments][4],
                    int tile, const uint32_t (&keys)[S::parts][2][words], const Seen<running>& seen, int offset,
                    float slope) const {
    const float zero[4] = {0, 0, 0, 0};
    float logits[2][4];
#pragma unroll
    for (int j = 0; j < fragments; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const auto& query = queries[0][tile][j];
        const uint32_t key0 = keys[0][n][2 * j], key1 = keys[0][n][2 * j + 1];
        if constexpr (running) {
          if (j == 0) multiply<typename S::Unit>(logits[n], seen.start[n], query, key0, key1);
        } else if (j == 0) multiply<typename S::Unit>(logits[n], zero, query, key0, key1);
        if (j > 0) multiply<typename S::Unit>(logits[n], query, key0, key1);
        if constexpr (S::split) {
          multiply<typename S::Unit>(logits[n], queries[1][tile][j], key0, key1);
          multiply<typename S::Unit>(logits[n], query, keys[1][n][2 * j], keys[1][n][2 * j + 1]);
        }
      }
    if constexpr (running) raise(sums, logits, offset, slope);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float a = logits[n][2 * h], b = logits[n][2 * h + 1];
        if constexpr (running) a = fmaf(a, slope, -sums.top[h]), b = fmaf(b, slope, -sums.top[h]);
        weights[2 * n + h] = row_seen(offset, h) ? pack<T>(core::exp2(a), core::exp2(b)) : 0;
        if constexpr (!running) weights[2 * n + h] &= seen.mask[n];
      }
  }

  // Row r of the keys and values that a step sees.
  template <bool running>
  DEVICE void absorb_row(Sums (&sums)[S::tiles], const uint32_t (&queries)[S::parts][S::tiles][fragments][4],
                         const Seen<running>& seen, uint32_t key_row, uint32_t value_row, int r,
                         float slope) const {
    const float zero[4] = {0, 0, 0, 0};
    uint32_t keys[S::parts][2][words];
#pragma unroll
    for (int p = 0; p < S::parts; ++p)
#pragma unroll
      for (int c = 0; c < words; c += 2) {
        uint32_t four[4];
        core::ldmatrix_x4(four, (key_row ^ c << 4) + r % 2 * S::row_bytes + p * S::rests_at);
        keys[p][0][c] = four[0], keys[p][0][c + 1] = four[1], keys[p][1][c] = four[2], keys[p][1][c + 1] = four[3];
      }
    uint32_t weights[S::tiles][4];
#pragma unroll
    for (int i = 0; i < S::tiles; ++i) {
      const int offset = r - 2 * i;
      if (offset < 0 || offset > S::window) continue;
      weigh<running>(weights[i], sums[i], queries, i, keys, seen, offset, slope);
      if (offset == 0) multiply<T>(sums[i].total, zero, weights[i], kOnes<T>, kOnes<T>);
      else multiply<T>(sums[i].total, weights[i], kOnes<T>, kOnes<T>);
    }
#pragma unroll
    for (int c = 0; c < words; c += 2) {
      uint32_t values[4];
      core::ldmatrix_x4_trans(values, (value_row ^ c << 4) + r % 2 * S::row_bytes);
#pragma unroll
      for (int i = 0; i < S::tiles; ++i) {
        const int offset = r - 2 * i;
        if (offset < 0 || offset > S::window) continue;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          if (offset == 0) multiply<T>(sums[i].out[c + m], zero, weights[i], values[2 * m], values[2 * m + 1]);
          else multiply<T>(sums[i].out[c + m], weights[i], values[2 * m], values[2 * m + 1]);
        }
      }
    }
  }

  // ---- results ----
  DEVICE void store_results(const Sums& sums, int row) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = sums.total[2 * h], inverse = core::reciprocal(total);
      uint32_t features[dim / 8];
#pragma unroll
      for (int c = 0; c < dim / 8; ++c)
        features[c] = pack<T>(sums.out[c][2 * h] * inverse, sums.out[c][2 * h + 1] * inverse);
      // Lane t has features 8c + 2t, + 1 of every c: neighbours exchange, so that each has 8 bytes and two make a sector.
      const bool odd = t & 1;
#pragma unroll
      for (int c = 0; c < dim / 8; c += 2) {
        const uint32_t got = core::shuffle_xor(odd ? features[c] : features[c + 1], 1);
        if (odd) features[c] = got;
        else features[c + 1] = got;
      }
      if (column >= args.width || row + h >= rows) continue;
      const int64_t at = result + int64_t(row + h) * (args.width * args.heads);
      char* out = static_cast<char*>(args.out) + at * S::token_bytes + (t & 1) * 16 + (t >> 1) * 8;
#pragma unroll
      for (int c = 0; c < dim / 8; c += 2) core::store_global<uint2>(out + c * 16, uint2{features[c], features[c + 1]});
      if (t == 0) core::store_global<float>(args.lse + at, (core::log2(total) + sums.top[h]) * kLn2);
    }
  }

  // ---- the march ----
  // Asks for the rows that the first step sees, and prepares them.
  DEVICE void load_first() const {
    load_step<true>(-S::skipped, S::skipped, S::skipped ? S::ring - S::skipped : 0);
    for (int i = S::step - S::skipped; i < S::live; i += S::step) load_step<true>(i, 0, i);
    core::copy_async_commit();
  }
  DEVICE void prepare_first() const {
    prepare_keys(-S::skipped, S::skipped, S::skipped ? S::ring - S::skipped : 0);
    for (int i = S::step - S::skipped; i < S::live; i += S::step) prepare_keys(i, 0, i);
  }

  template <bool running>
  DEVICE void march(float factor) const {
    const float query_factor = !running ? factor : factor < 0 ? -1.0f : 1.0f;
    const float slope = fmaxf(fabsf(factor), 1e-30f);  // not 0, which −inf may not be multiplied by
    const Seen<running> seen(g, t, args.window_columns);
    // Of a warp's 16 columns of keys the last, seen by no query, are not there at the strip's end: others stand in.
    const bool last = warp == S::warps - 1;
    const auto place_in_row = [&](int column, int chunk) {
      const int key_column = kTileColumns * warp + column - (last && column >= 7 + S::window ? 8 : 0);
      return key_column * S::token_bytes + (chunk ^ swizzle<dim>(lane & 7)) * 16;
    };
    const int key_at = place_in_row((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    const int value_at = S::values_at + place_in_row(lane & 15, lane >> 4);
    const bool active = first_column + kTileColumns * warp < args.width;

    core::sync_block();  // the tables
    Quarter<dim> raw[S::tiles][2];
    load_first();
    if (active) load_queries(raw, first_row);
    core::copy_async_wait<0>();
    prepare_first();
    int base = 0;  // slot of the first row that is seen
#pragma unroll 1
    for (int done = 0; done < rows; done += S::step) {
      const int coming = done + S::live, beyond = base + S::live;
      const int coming_slot = beyond >= S::ring ? beyond - S::ring : beyond;
      core::sync_block();
      if (done + S::step < rows) load_step(coming, 0, coming_slot);
      core::copy_async_commit();
      if (active) {
        uint32_t queries[S::parts][S::tiles][fragments][4];
        prepare_queries(queries, raw, done, query_factor);
        Sums sums[S::tiles];
        uint32_t row = shared + base * S::row_bytes;
#pragma unroll
        for (int r = 0; r < S::live; ++r) {
          if (S::whole || r < S::step - 1 + args.window_rows)
            absorb_row<running>(sums, queries, seen, row + key_at, row + value_at, r, slope);
          if (r == S::rounds_from) {  // the next step's keys have come (after the last step nobody reads what lies there)
            core::copy_async_wait<0>();
            core::sync_warp();
          }
#pragma unroll
          for (int n = 0; n < S::rounds_per_row; ++n)
            if (r >= S::rounds_from)
              prepare_key(key_of_round((r - S::rounds_from) * S::rounds_per_row + n), coming, coming_slot);
          if (r % 2 == 1)  // the ring ends after an odd row
            row = row + 2 * S::row_bytes == shared + S::values_at ? shared : row + 2 * S::row_bytes;
        }
        if (done + S::step < rows) load_queries(raw, first_row + done + S::step);
#pragma unroll
        for (int i = 0; i < S::tiles; ++i) {
          if constexpr (!running) sums[i].top[0] = sums[i].top[1] = 0;
          store_results(sums[i], done + 2 * i);
        }
      } else {
        core::copy_async_wait<0>();
        prepare_keys(coming, 0, coming_slot);
      }
      base = base + S::step >= S::ring ? base + S::step - S::ring : base + S::step;
    }
    core::copy_async_wait<0>();
  }
};

template <class S, int blocks>
__global__ void __launch_bounds__(S::threads, blocks) strips_forward(const Args args) {
  const Block<S> block(args);
  float factor = args.scale * kLog2E;
  if constexpr (S::cosine) factor *= core::load_global<float>(args.cosine_scale + block.head);
  if constexpr (S::cosine && std::is_same_v<typename S::T, Float16>)
    if ((fabsf(factor) > kSplit) != S::split) return;  // for the other kernel
  block.store_tables();
  if constexpr (S::cosine && !S::split)
    if (fabsf(factor) <= kBound<typename S::T>) return block.template march<false>(factor);
  block.template march<true>(factor);
}

// `blocks`: on a multiprocessor at once.
template <class S, int blocks>
bool launch(const NeighborhoodAttention& a, void* stream) {
  // Up to what blocks may share; where that is less than on sm_90, fewer run at once.
  const int64_t most_bytes = std::min<int64_t>(core::most_shared_bytes(), (228 << 10) / blocks - 1024);
  const int most_rows = int((most_bytes - S::bytes(0)) / (S::bytes(1) - S::bytes(0)) / S::step) * S::step;
  if (most_rows < S::step) return false;
  const int64_t strips = ceil_div(a.columns.length, kTileColumns * S::warps) * a.heads * a.batch;
  const int64_t at_once = int64_t(core::multiprocessors()) * blocks;
  const int rows = segment_rows(int(a.rows.length), strips, at_once, S::step, S::live + S::step, most_rows);
  const Args args = args_of(a, kTileColumns * S::warps, rows);
  if (strips * args.segments > INT32_MAX) return false;
  const std::string call = "neighborhood_attention_strips_forward of q (" + std::to_string(a.batch) + ", " +
                           std::to_string(a.rows.length) + ", " + std::to_string(a.columns.length) + ", " +
                           std::to_string(a.heads) + ", " + std::to_string(a.dim) + ")";
  const dim3 grid(unsigned(strips * args.segments));
  core::launch(call, strips_forward<S, blocks>, grid, dim3(S::threads), S::bytes(rows), stream, args);
  return true;
}

// What is compiled: kernels that take any number of rows up to 5 or 9, and for what is common such of exactly so many.
template <class T, bool cosine>
bool launch_for_shape(const NeighborhoodAttention& a, void* stream) {
  constexpr bool common = cosine && std::is_same_v<T, BFloat16>;
  if constexpr (cosine && !common) {  // first: where it does not fit, all is left to the general path
    const bool launched = a.dim == 32   ? launch<Strip<T, true, 32, 9, false, 1, 2, true>, 2>(a, stream)
                          : a.dim == 64 ? launch<Strip<T, true, 64, 9, false, 1, 2, true>, 1>(a, stream)
                                        : launch<Strip<T, true, 128, 9, false, 1, 2, true>, 1>(a, stream);
    if (!launched) return false;
  }
  const int64_t rows = a.rows.kernel, widest = std::max(rows, a.columns.kernel);
  if (a.dim == 64) {
    if (rows == 7 && widest == 7) return launch<Strip<T, cosine, 64, 7, true, 2, 3>, 2>(a, stream);
    if constexpr (common) {
      if (rows == 3 && widest == 3) return launch<Strip<T, cosine, 64, 3, true, 2, 4>, 2>(a, stream);
      if (rows == 5 && widest == 5) return launch<Strip<T, cosine, 64, 5, true, 2, 3>, 2>(a, stream);
      if (rows == 9) return launch<Strip<T, cosine, 64, 9, true, 2, 2>, 2>(a, stream);
    }
    if (widest <= 5) return launch<Strip<T, cosine, 64, 5, false, 2, 3>, 2>(a, stream);
    return launch<Strip<T, cosine, 64, 9, false, 2, 2>, 2>(a, stream);
  }
  if (a.dim == 32) {
    if constexpr (common)
      if (rows == 7 && widest == 7) return launch<Strip<T, cosine, 32, 7, true, 2, 4>, 2>(a, stream);
    return launch<Strip<T, cosine, 32, 9, false, 2, 4>, 2>(a, stream);
  }
  if constexpr (common)
    if (rows == 7 && widest == 7) return launch<Strip<T, cosine, 128, 7, true, 1, 3>, 1>(a, stream);
  return launch<Strip<T, cosine, 128, 9, false, 1, 2>, 1>(a, stream);
}

}  // namespace

bool neighborhood_attention_strips_forward_cuda(const NeighborhoodAttention& a, void* stream) {
  if (!takes(a) || (a.dim != 32 && a.dim != 64 && a.dim != 128)) return false;
  if (a.batch == 0 || a.heads == 0) return true;
  if (a.dtype == DType::bfloat16)
    return a.cosine_scale ? launch_for_shape<BFloat16, true>(a, stream) : launch_for_shape<BFloat16, false>(a, stream);
  return a.cosine_scale ? launch_for_shape<Float16, true>(a, stream) : launch_for_shape<Float16, false>(a, stream);
}

}  // namespace hdit
