// dq, dk and dv in one march: the fast path's backward pass where a block can have the shared memory (Hopper), for heads
// of 64 and windows of up to 7 (strips_backward_cuda.cu: the whole).
//
// Half of a block's warps own a tile of 2 × 8 keys each and march down a strip of 32 columns; rows of prepared queries
// and of dout stream through rings, as for keys_kernel. The ds that they compute go through shared memory, with the
// prepared keys, to the other half, one step behind: each of these warps adds up dq of 8 columns of queries, of four
// pairs of rows at a time, in registers; each step completes a pair.
//
// Columns. A tile of keys is seen by 16 columns of queries, and 8 columns of queries see two tiles: those of the last
// in a strip also see the first keys of the next strip. The ds of that tile, of its left half, are computed twice, the
// second time by the warps of queries, a pair of rows each. Nothing is added up across blocks.
//
// Rows. At a border a key is seen by rows of queries that are not among the four pairs in progress, and where a block's
// rows begin and end its queries see keys of its neighbours: steps before and after its own ones give only ds (March).
//
// ds are scaled by one power of two for all of a block, from the largest dout, delta and values that it has met so far;
// sums in progress are scaled down when it falls. For bfloat16 the weights have it too, as that costs an addition to
// their exponents, and dv loses it again in float32.
#include "strips_backward.cuh"

namespace hdit {
namespace {

using namespace strips;

constexpr int kDim = 64, kMostFusedWindow = 7;
constexpr int kTiles = 4;  // of keys, in a block; as many warps for keys as for queries
constexpr int kFusedWarps = 2 * kTiles;
constexpr int kPairs = 4;  // of rows of queries whose dq is being added up
constexpr int kRing = 14;  // rows: the most that a step needs (a height of 13 or 14)
constexpr int kLeastRows = 12, kMostFusedRows = 192;  // of a segment; the least if there are several
constexpr float kMostExponent = 100;

// Shared memory.
constexpr int kRingColumns = kTileColumns * (kTiles + 1), kTableColumns = kRingColumns + kTileColumns;
constexpr int kTileBytes = 16 * 2 * kDim, kDsRow = 512, kDsTile = 2 * kPairs * kDsRow;
constexpr int kXRing = 0, kYRing = kXRing + kRing * kRingColumns * 2 * kDim;
constexpr int kScalars = kYRing + kYRing;  // rings of levels, −delta, 1 / lengths
constexpr int kScalarRing = kRing * kRingColumns * 4;
constexpr int kDs = (kScalars + 3 * kScalarRing + 127) / 128 * 128;
constexpr int kKeys = kDs + 2 * (kTiles + 1) * kDsTile;
constexpr int kLargest = kKeys + (2 * kTiles + 3) * kTileBytes;
constexpr int kImages = kLargest + 2 * kFusedWarps * 16;
constexpr int kColumnTable = kImages + 128;
constexpr int kSteps = kColumnTable + kTableColumns * (kDim / 2);  // then the table of rows

// What lies at kImages: where the block's head begins in each tensor.
enum Image { kQ, kDout, kOut, kK, kV, kDq, kDk, kDv, kLse, kDlse, kNumberOfImages };
static_assert(kNumberOfImages * 8 <= 128);

// ---- which rows a step is about --------------------------------------------------------------------------------------
// A block owns the rows of keys begin … end − 1, in pairs, and queries query_begin … query_end − 1. Each step is about
// a pair of rows of keys. Its ds are of pairs of rows of queries from `base` on.
struct March {
  int begin, end, height, window;
  int back, shift;             // rows from a key back to its first query; from there to the block's first query
  int before, middle, after;   // steps; those in the middle are about the block's own keys
  bool first, last;
  int query_begin, query_end;

  BOTH March(int begin_, int end_, int height_, int window_)
      : begin(begin_), end(end_), height(height_), window(window_), back(window - 1 - window / 2),
        shift((window + 1) / 4 * 2), first(begin == 0), last(end == height) {
    // At the top: rows of keys which queries see whose pairs come before theirs.
    before = first ? most(0, (window + 1 - first_low()) / 2) : (window - shift) / 2;
    middle = (end - begin + 1) / 2;
    after = last ? most(0, (height - kTileColumns + 1 + back - first_high()) / 2) : shift / 2;
    query_begin = first ? -(back % 2) : begin - back + shift;
    query_end = last ? (height + back % 2 + 1) / 2 * 2 - back % 2 : end - back + shift;
  }
  BOTH int first_low() const { return back / 2 * 2 + 2; }
  BOTH int first_high() const { return (most(height - window - 1, 0) + 1) / 2 * 2; }
  BOTH int steps() const { return before + middle + after; }
  BOTH bool own(int i) const { return i >= before && i < before + middle; }
  BOTH int key(int i) const {
    if (i < before) return first ? first_low() + 2 * i : begin - 2 * (before - i);
    if (i < before + middle || !last) return begin + 2 * (i - before);
    return first_high() + 2 * (i - before - middle);
  }
  BOTH int base(int i) const {
    if (first && i < before) return -back;
    return (last && i >= before + middle ? begin + 2 * (middle - 1) : key(i)) - back;
  }
  // The rows of queries that a step gives ds of; whole pairs, which may lie half outside of the image.
  BOTH int from(int i) const {
    if (i < before) return query_begin;
    if (last && i >= before + middle) return key(i) - back + 2 * kPairs;
    return most(base(i), query_begin);
  }
  BOTH int to(int i) const {
    if (first && i < before) return key(i) - back - 1;
    const int seen = last_query(least(key(i) + 1, height - 1), height, window);
    return least(least(base(i) + ((seen - base(i)) | 1), base(i) + 2 * kPairs - 1), query_end - 1);
  }
  // The rows of queries that a step reads.
  BOTH int low(int i) const { return own(i) ? first_query(key(i), window) : most(from(i), 0); }
  BOTH int high(int i) const {
    if (!own(i)) return most(0, least(to(i), height - 1));
    return most(least(to(i), height - 1), last_query(least(key(i) + 1, height - 1), height, window));
  }
  // The first row of queries that must be in the ring during step i, in which the pair that was the first of step i − 1
  // is completed.
  BOTH int ring_begin() const { return first_query(begin, window); }
  BOTH int needed(int i) const {
    if (i < before || i == 0) return ring_begin();
    const int kept = base(i - 1);
    return most(ring_begin(), i < steps() ? least(low(i), kept) : kept);
  }
  // Of the tables of angles.
  BOTH int first_row() const { return first ? 0 : most(0, least(ring_begin(), begin - 2 * before)); }
  BOTH int end_row() const { return least(height, end + most(window / 2, shift)); }
  // Rows of queries are copied to the ring during step i until they are there up to this one, which is excluded.
  BOTH int limit(int i) const { return i + 1 < steps() ? least(high(i + 1), needed(i) + kRing - 1) + 1 : 0; }
};

// A step as it lies in shared memory.
struct alignas(16) Numbers {
  int a, b, c, d;
};
struct Step {
  static constexpr int kBytes = 48;
  // Bits of `flags`: 0: own; from kDone: how many pairs of the step before are completed; from kSeen: which of the four
  // pairs have ds; from kInside: which of the rows completed are the block's.
  static constexpr int kOwn = 1, kDone = 1, kSeen = 4, kInside = 8;
  int key, base, from, to;       // as March has them, of rows in the image
  int begin, end, limit, flags;  // the rows of queries that it reads
  int first[2], last[2];         // those that see the two rows of keys

  DEVICE Step(uint32_t at) {
    const Numbers x = core::load_shared<Numbers>(at), y = core::load_shared<Numbers>(at + 16);
    key = x.a, base = x.b, from = x.c, to = x.d, begin = y.a, end = y.b, limit = y.c, flags = y.d;
  }
  DEVICE void load_seen(uint32_t at) {
    const Numbers z = core::load_shared<Numbers>(at + 32);
    first[0] = z.a, last[0] = z.b, first[1] = z.c, last[1] = z.d;
  }
  DEVICE bool own() const { return flags & kOwn; }
  DEVICE int done() const { return flags >> kDone & 7; }
  DEVICE uint32_t seen(int row, int half) const { return row >= first[half] && row <= last[half] ? ~0u : 0u; }
};

// Each thread writes some steps of a block's march, so that none computes them again.
DEVICE void store_steps(const March& march, uint32_t steps_at) {
  for (int i = threadIdx.x; i <= march.steps(); i += blockDim.x) {
    const int before = i > 0 ? march.base(i - 1) : 0;
    int done = i == march.steps() ? kPairs : i > 0 && march.base(i) != before, flags = done << Step::kDone;
    for (int row = 0; row < 2 * done; ++row) {
      const int y = before + row;
      if (y >= most(march.query_begin, 0) && y < least(march.query_end, march.height))
        flags |= 1 << (Step::kInside + row);
    }
    Numbers x = {}, y = {0, -1, 0, flags}, z = {};
    if (i < march.steps()) {
      const int key = march.key(i), base = march.base(i), from = march.from(i), to = march.to(i);
      for (int pair = 0; pair < kPairs; ++pair)
        if (base + 2 * pair >= from && base + 2 * pair <= to) flags |= 1 << (Step::kSeen + pair);
      if (march.own(i)) flags |= Step::kOwn;
      const bool second = key + 1 < march.height;
      x = {key, base, most(from, 0), least(to, march.height - 1)};
      y = {march.low(i), march.high(i), march.limit(i), flags};
      z = {first_query(key, march.window), last_query(key, march.height, march.window),
           second ? first_query(key + 1, march.window) : march.height,
           second ? last_query(key + 1, march.height, march.window) : -1};
    }
    const uint32_t at = steps_at + i * Step::kBytes;
    core::store_shared<Numbers>(at, x);
    core::store_shared<Numbers>(at + 16, y);
    core::store_shared<Numbers>(at + 32, z);
  }
}

// One thread writes where the block's head begins.
DEVICE void store_images(const BackwardArgs& args, const Place& place, uint32_t shared) {
  const Args& f = args.forward;
  const int64_t scalars = scalar_at(f, place, 0, 0);
  const auto store = [&](Image image, const void* at) {
    core::store_shared<uint64_t>(shared + kImages + 8 * image, reinterpret_cast<uint64_t>(at));
  };
  store(kQ, image_of(f.q, place)), store(kK, image_of(f.k, place)), store(kV, image_of(f.v, place));
  store(kOut, image_of(args.out, place)), store(kDout, image_of(args.dout, place));
  store(kDq, image_of(args.dq, place)), store(kDk, image_of(args.dk, place)), store(kDv, image_of(args.dv, place));
  store(kLse, f.lse + scalars), store(kDlse, args.dlse + scalars);
}

// ---- one row of queries against a tile of keys -----------------------------------------------------------------------
enum class Rows { all, some };  // whether both rows of keys are seen

// What one row of queries adds to dk and dv (if `own`), and its ds to `ds_at` (if not 0). scalars: levels of the row's
// queries, and kScalarRing bytes later −delta. offset: to be added to levels, −infinity where a query does not see the
// lane's key; seen: bits of the two rows of keys; scale: of ds, where offset has not scaled it.
template <int dim, class T, bool cosine, bool own, Rows rows, int eights>
DEVICE void add_row(float (&dk)[dim / 8][4], float (&dv)[dim / 8][4], const KeyTile<dim>& tile, uint32_t queries,
                    uint32_t douts, uint32_t scalars, const Sixteen<dim>& places, const float (&offset)[eights][2],
                    const uint32_t (&seen)[2], float slope, float scale, uint32_t ds_at) {
  using Unit = Held<T, cosine>;
  const int lane = threadIdx.x % 32;
  const uint32_t at = scalars + lane % 4 * 8;
  float p[eights][4], d[eights][4], start[eights][4];
  times_prepared<dim, Unit>(p, tile.k, queries, places);
#pragma unroll
  for (int n = 0; n < eights; ++n) {
    const float2 level = core::load_shared<float2>(at + 32 * n);
    const float2 delta = core::load_shared<float2>(at + 32 * n + kScalarRing);
    const float levels[2] = {level.x + offset[n][0], level.y + offset[n][1]};
    start[n][0] = start[n][2] = delta.x, start[n][1] = start[n][3] = delta.y;
#pragma unroll
    for (int e = 0; e < 4; ++e) p[n][e] = core::exp2(fmaf(p[n][e], slope, levels[e % 2]));
  }
  times_raw<dim, T>(d, start, tile.v, douts, places);
  uint32_t weights[2 * eights], ds[2 * eights];
#pragma unroll
  for (int n = 0; n < eights; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = p[n][2 * half], second = p[n][2 * half + 1];
      float ds_first = d[n][2 * half] * first, ds_second = d[n][2 * half + 1] * second;
      if constexpr (std::is_same_v<T, Float16>) ds_first *= scale, ds_second *= scale;
      weights[2 * n + half] = pack<T>(first, second), ds[2 * n + half] = pack<Unit>(ds_first, ds_second);
      if constexpr (rows == Rows::some) weights[2 * n + half] &= seen[half], ds[2 * n + half] &= seen[half];
    }
  if (ds_at != 0)
#pragma unroll
    for (int i = 0; i < 2 * eights; ++i) core::store_shared<uint32_t>(ds_at + i * 128 + lane * 4, ds[i]);
  if constexpr (own) {
    add_weighted<dim, T>(dv, weights, douts, places);
    add_weighted<dim, Unit>(dk, ds, queries, places);
  }
}

// ---- what all warps do at every step ---------------------------------------------------------------------------------
template <int dim, class T, bool cosine>
struct Walk {
  static constexpr bool kNarrow = std::is_same_v<Held<T, cosine>, Float16>;  // ds is rounded to float16
  static constexpr bool kFold = kNarrow && std::is_same_v<T, BFloat16>;      // weights have the scale of ds

  const BackwardArgs& args;
  Stream<dim> stream;
  uint32_t shared;
  int lane, warp, steps, have, have_slot, turn, coming;
  float dout, delta, value;  // the largest that this lane has met
  float exponent, exponent_before, factor, slope;

  DEVICE Walk(const BackwardArgs& args_) : args(args_), shared(core::dynamic_shared()) {
    const Args& f = args.forward;
    lane = threadIdx.x % 32, warp = core::uniform(threadIdx.x / 32);
    const Place place = place_of(blockIdx.x, f);
    const int begin = place.segment * f.rows, back = keys_reach_back(f.window_columns);
    const March march(begin, place.segment == f.segments - 1 ? f.height : begin + f.rows, f.height, f.window_rows);
    steps = march.steps();
    have = march.ring_begin(), have_slot = 0, turn = 0, coming = 0;
    factor = factor_of(f, place.head), slope = factor * kLog2E;
    dout = delta = value = 0, exponent = exponent_before = kNarrow ? kMostExponent : 0;
    stream.x = f.q, stream.y = args.dout;
    stream.x_ring = shared + kXRing, stream.y_ring = shared + kYRing;
    stream.column_table = shared + kColumnTable, stream.row_table = shared + kSteps + args.layout.row_table;
    stream.columns = kRingColumns, stream.ring = kRing;
    stream.height = f.height, stream.width = f.width;
    stream.window_rows = f.window_rows, stream.window_columns = f.window_columns;
    stream.first_row = march.first_row();
    stream.first_column = args.first_strip + place.strip * (kTileColumns * kTiles) - back;
    stream.groups = least(kTiles + 1, (f.width - stream.first_column - back + kTileColumns - 1) / kTileColumns + 1);
    store_angles<dim>(f, place.head, stream.row_table, stream.first_row, march.end_row() - stream.first_row,
                      stream.column_table, stream.first_column, kTableColumns, threadIdx.x, blockDim.x);
    store_steps(march, shared + kSteps);
    if (threadIdx.x == 0) store_images(args, place, shared);
    core::sync_block();
  }

  DEVICE char* image(Image which) const {
    return reinterpret_cast<char*>(core::load_shared<uint64_t>(shared + kImages + 8 * which));
  }
  // Where the number of a token lies in a (height, width, heads) image.
  DEVICE const float* scalar(char* image, int row, int column) const {
    const int heads = args.forward.heads;
    return reinterpret_cast<const float*>(image) + int64_t(row) * (stream.width * heads) + column * heads;
  }
  DEVICE uint32_t step_at(int i) const { return shared + kSteps + i * Step::kBytes; }
  DEVICE int key_column(int tile) const {
    return stream.first_column + kTileColumns * tile + keys_reach_back(stream.window_columns);
  }
  DEVICE bool active(int tile) const {
    return key_column(tile) < stream.width && key_column(tile) + kTileColumns > 0;
  }
  DEVICE int slot_of(int row) const {
    const int slot = have_slot - (have - row);
    return slot < 0 ? slot + kRing : slot;
  }
  // Where the warps leave tiles for others: of keys those of the strip in turns of two, the one beyond it of three.
  DEVICE uint32_t keys_at(int i, int tile) const {
    return shared + kKeys + (tile < kTiles ? i % 2 * kTiles + tile : 2 * kTiles + i % 3) * kTileBytes;
  }
  DEVICE uint32_t ds_at(int i, int tile) const { return shared + kDs + (i % 2 * (kTiles + 1) + tile) * kDsTile; }
  DEVICE void leave_keys(int i, int tile, int half, const Quarter<dim>& keys) const {
    const uint32_t at = keys_at(i, tile) + (8 * half + lane / 4) * (2 * dim);
    store_prepared<dim>(at + swizzle<dim>(lane / 4) * 16, lane % 4, keys);
  }

  DEVICE void load() {
    char* const lse = image(kLse);
    stream.x_image = image(kQ), stream.y_image = image(kDout);
    stream.template load<false>(have, coming, have_slot, [&](int row, int column, int at) {
      if (threadIdx.x % 4 == 1) core::copy_async_4(shared + kScalars + 4 * at, scalar(lse, row, column));
    });
    core::copy_async_commit();
  }

  // The rows that were copied: queries prepared, and their levels, −delta and lengths.
  DEVICE void prepare() {
    char *const out_image = image(kOut), *const dlse_image = args.dlse != nullptr ? image(kDlse) : nullptr;
    core::copy_async_wait<0>();
    const auto finish = [&](int at, uint32_t y, int row, int column, float length) {
      const int t = threadIdx.x % 4;
      const int x = stream.nearest_column(column);
      const Quarter<dim> out = load_raw<dim>(token_at(args.out, out_image, row, x), t, 0);
      const Quarter<dim> given = stream.load_y(y);
      float dot = 0, dlse = 0;
#pragma unroll
      for (int c = 0; c < dim / 8; ++c) dot = dot_of_words<T>(given.word[c], out.word[c], dot);
      if (dlse_image != nullptr) dlse = core::load_global<float>(scalar(dlse_image, row, x));
      const float neg_delta = dlse - sum_of_token(dot);
      const uint32_t scalars = shared + kScalars + 4 * at;
      if (t == 1) core::store_shared<float>(scalars, core::load_shared<float>(scalars) * -kLog2E);
      if (t == 2) core::store_shared<float>(scalars + kScalarRing, neg_delta);
      if (t == 3) core::store_shared<float>(scalars + 2 * kScalarRing, length);
      if constexpr (kNarrow) {
        dout = fmaxf(dout, if_finite(largest_of<dim, T>(given)));
        delta = fmaxf(delta, if_finite(fabsf(neg_delta)));
      }
    };
    stream.template prepare<T, cosine>(have, coming, have_slot, finish);
    have += coming, have_slot += coming;
    if (have_slot >= kRing) have_slot -= kRing;
  }

  DEVICE void meet_value(const Quarter<dim>& raw) { value = fmaxf(value, if_finite(largest_of<dim, T>(raw))); }
  // Tells the others what is the largest that this warp has met.
  DEVICE void share_largest() const {
    if constexpr (kNarrow) {
      const uint4 met = {core::max_of_warp(core::as_bits(dout)), core::max_of_warp(core::as_bits(delta)),
                         core::max_of_warp(core::as_bits(value)), 0};
      if (lane == 0) core::store_shared<uint4>(shared + kLargest + (turn * kFusedWarps + warp) * 16, met);
    }
  }
  DEVICE void set_exponent() {
    if constexpr (kNarrow) {
      const uint4 met = core::load_shared<uint4>(shared + kLargest + (turn * kFusedWarps + lane % kFusedWarps) * 16);
      const float most_dout = core::as_float(core::max_of_warp(met.x));
      const float most_delta = core::as_float(core::max_of_warp(met.y));
      const float most_value = core::as_float(core::max_of_warp(met.z));
      exponent_before = exponent;
      exponent = fminf(exponent, exponent_of_ds<dim>(most_dout, fmaxf(most_value, 0x1p-66f), most_delta));
    }
  }

  // Meets the other warps, and starts copies of rows that the next step needs; or, where the ring had no room for them
  // until now, of those that this one needs, and it has to wait for the next meeting: then false.
  DEVICE bool begin(const Step& step) {
    core::sync_block();
    const bool ready = have > step.end;
    if (ready) set_exponent();
    turn ^= 1;
    coming = most(0, (ready ? step.limit : step.end + 1) - have);
    load();
    return ready;
  }
};

// What is added to levels: which of the queries see a lane's key of tile `tile`.
template <int dim, class T, bool cosine, int eights>
DEVICE void columns_seen(float (&offset)[eights][2], const Walk<dim, T, cosine>& walk, int tile) {
  const int x = walk.key_column(tile) + walk.lane / 4, window = walk.stream.window_columns, width = walk.stream.width;
#pragma unroll
  for (int n = 0; n < eights; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int query = walk.stream.first_column + kTileColumns * (tile + n) + 2 * (walk.lane % 4) + e;
      const bool seen =
          x >= 0 && x < width && query >= first_query(x, window) && query <= last_query(x, width, window);
      offset[n][e] = seen ? 0.0f : -INFINITY;
    }
}

// ---- the warps of keys -----------------------------------------------------------------------------------------------
template <int dim, class T, bool cosine>
DEVICE void march_with_keys(Walk<dim, T, cosine>& walk, int tile_index) {
  const Stream<dim>& stream = walk.stream;
  const int lane = walk.lane, last_row = stream.height - 1, column = kTileColumns * tile_index;
  const int x = walk.key_column(tile_index) + lane / 4, safe_x = most(0, least(x, stream.width - 1));
  const bool active = walk.active(tile_index), inside = x >= 0 && x < stream.width;
  const Sixteen<dim> places(column, lane);
  float columns[2][2];
  columns_seen(columns, walk, tile_index);
  KeyTile<dim> tile;
  RawKeys<dim> raw;
  const auto load = [&](int key) {
    const int y[2] = {key, least(key + 1, last_row)};
    raw = load_keys<dim>(walk.args, walk.image(kK), walk.image(kV), y, safe_x);
  };
  const auto prepare = [&](int key) {
    const int y[2] = {key, least(key + 1, last_row)};
    walk.meet_value(raw.v[0]);
    walk.meet_value(raw.v[1]);
    prepare_keys<dim, T, cosine>(tile, raw, stream, y, safe_x);
  };
#pragma unroll 1
  for (int i = -1; i <= walk.steps;) {
    // The first time there is nothing to do but to prepare keys.
    Step step(walk.step_at(most(i, 0)));
    const bool ready = i < 0 || walk.begin(step);
    if (i >= 0 && ready && active && i < walk.steps) {
      step.load_seen(walk.step_at(i));
#pragma unroll
      for (int half = 0; half < 2; ++half) walk.leave_keys(i, tile_index, half, take<dim>(tile.k, half));
      const float scale = core::exp2(walk.exponent), unscale = core::exp2(-walk.exponent);
      float offset[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) offset[n][e] = columns[n][e] + (walk.kFold ? walk.exponent : 0.0f);
      const bool own = step.own();
      int slot = walk.slot_of(step.begin);
      uint32_t ds = walk.ds_at(i, tile_index) + (step.begin - step.base) * kDsRow;
      float dk[dim / 8][4] = {}, dv[dim / 8][4] = {};
#pragma unroll 1
      for (int r = step.begin; r <= step.end;) {
        const auto add = [&](auto is_own, auto which) {
          const uint32_t queries = walk.shared + kXRing + slot * (kRingColumns * 2 * dim);
          const uint32_t scalars = walk.shared + kScalars + (slot * kRingColumns + column) * 4;
          const uint32_t seen[2] = {step.seen(r, 0), step.seen(r, 1)};
          add_row<dim, T, cosine, decltype(is_own)::value, decltype(which)::value, 2>(
              dk, dv, tile, queries, queries + (kYRing - kXRing), scalars, places, offset, seen, walk.slope, scale,
              r >= step.from && r <= step.to ? ds : 0);
          ++r, ds += kDsRow;
          if (++slot == kRing) slot = 0;
        };
        using Some = std::integral_constant<Rows, Rows::some>;
        if (!own) add(std::false_type(), Some());
        else if (r < step.first[1] || r > step.last[0]) add(std::true_type(), Some());
        else
#pragma unroll 1
          do add(std::true_type(), std::integral_constant<Rows, Rows::all>());
          while (r <= step.last[0]);
      }
      if (own) {
        const int y[2] = {step.key, least(step.key + 1, last_row)};
        const bool mine[2] = {inside, inside && step.key + 1 <= last_row};
        const float factors[2] = {walk.factor * unscale, walk.factor * unscale};
        store_keys<dim, T, cosine, Sums::both>(dk, dv, tile, walk.args, walk.image(kDk), walk.image(kDv), stream, y,
                                               safe_x, mine, factors, walk.kFold ? unscale : 1.0f);
      }
    }
    const bool more = ready && active && i + 1 < walk.steps;
    const int key = more ? core::load_shared<int>(walk.step_at(i + 1)) : 0;
    if (more) load(key);
    if (i >= 0) walk.prepare();
    if (more) prepare(key);
    walk.share_largest();
    if (ready) ++i;
  }
}

// ---- the warps of queries --------------------------------------------------------------------------------------------
// dq of 8 columns of queries, in pairs of rows.
template <int dim>
using PairSums = float[kPairs][dim / 8][4];

// What a step adds to queries that are the half `eight` of a tile: ds · keys, of the pairs of rows in `flags`.
template <int dim, class T, bool cosine>
DEVICE void add_keys(PairSums<dim>& dq, uint32_t keys_at, uint32_t ds_at, int eight, int flags) {
  using Unit = Held<T, cosine>;
  const int lane = threadIdx.x % 32;
  const Sixteen<dim> places(0, lane);
  ds_at += (lane / 8 % 2) * kDsRow + eight * 256 + (lane / 16) * 128 + lane % 8 * 16;
  uint32_t keys[dim / 16][4];
#pragma unroll
  for (int c = 0; c < dim / 16; ++c) core::ldmatrix_x4_trans(keys[c], keys_at + (places.transposed_at ^ c << 5));
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    if (!(flags >> (Step::kSeen + pair) & 1)) continue;
    uint32_t ds[4];
    core::ldmatrix_x4_trans(ds, ds_at + 2 * pair * kDsRow);
#pragma unroll
    for (int c = 0; c < dim / 8; ++c)
      multiply<Unit>(dq[pair][c], ds, keys[c / 2][2 * (c % 2)], keys[c / 2][2 * (c % 2) + 1]);
  }
}

// Writes dq of the first pair, rows `row` and row + 1 where `inside` has bits, and moves the others up. Returns this
// lane's part of the gradient of cosine_scale.
template <int dim, class T, bool cosine>
DEVICE float store_pair(PairSums<dim>& dq, const Walk<dim, T, cosine>& walk, int row, int inside, int column,
                        float exponent) {
  const int lane = walk.lane, ring_column = column + lane / 4, x = walk.stream.first_column + ring_column;
  const float unscale = core::exp2(-exponent);
  const Sixteen<dim> places(column, lane);
  float sum = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!(inside >> half & 1)) continue;
    const int y = row + half, slot = walk.slot_of(y);
    const uint32_t at = walk.shared + kXRing + slot * (kRingColumns * 2 * dim);
    Quarter<dim> prepared, result;
#pragma unroll
    for (int c = 0; c < dim / 32; ++c) {
      uint32_t words[4];
      core::ldmatrix_x4(words, at + (places.prepared_at ^ c << 6));
#pragma unroll
      for (int m = 0; m < 4; ++m) prepared.word[4 * c + m] = words[m];
    }
    const float length = core::load_shared<float>(walk.shared + kScalars + 2 * kScalarRing +
                                                  (slot * kRingColumns + ring_column) * 4);
    const float part =
        gradient_of_token<dim, T, cosine>(result, dq[0], half, prepared, length, walk.factor * unscale,
                                          walk.stream.angles_at(y, ring_column, lane % 4));
    const bool mine = x >= 0 && x < walk.stream.width;
    sum += mine ? part * unscale : 0.0f;
    if (mine && walk.args.dq.data != nullptr)
      store_quarter<dim>(token_at(walk.args.dq, walk.image(kDq), y, x), lane % 4, result);
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
    for (int c = 0; c < dim / 8; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[pair][c][e] = pair + 1 < kPairs ? dq[(pair + 1) % kPairs][c][e] : 0.0f;
  return sum;
}

// The tile beyond the strip, which the next strip owns: warp `index` computes ds of one pair of rows.
template <int dim, class T, bool cosine>
DEVICE void add_tile_beyond(const Walk<dim, T, cosine>& walk, Step& step, int i, int index,
                            const Quarter<dim> (&values)[2], const float (&columns)[1][2]) {
  const int lane = walk.lane, column = kTileColumns * kTiles, pair = step.base + 2 * index;
  const int begin = most(pair, step.from), end = least(pair + 1, step.to);
  const Sixteen<dim> places(column, lane), key_places(0, lane);
  step.load_seen(walk.step_at(i));
  KeyTile<dim> tile;
#pragma unroll
  for (int c = 0; c < dim / 16; ++c)
    core::ldmatrix_x4(tile.k[c], walk.keys_at(i, kTiles) + (key_places.transposed_at ^ c << 5));
#pragma unroll
  for (int half = 0; half < 2; ++half) put<dim>(tile.v, half, values[half]);
  const float folded = walk.kFold ? walk.exponent : 0.0f, scale = core::exp2(walk.exponent);
  const float offset[1][2] = {{columns[0][0] + folded, columns[0][1] + folded}};
#pragma unroll 1
  for (int r = begin; r <= end; ++r) {
    const int slot = walk.slot_of(r);
    const uint32_t queries = walk.shared + kXRing + slot * (kRingColumns * 2 * dim);
    const uint32_t scalars = walk.shared + kScalars + (slot * kRingColumns + column) * 4;
    const uint32_t seen[2] = {step.seen(r, 0), step.seen(r, 1)};
    float none[dim / 8][4];
    add_row<dim, T, cosine, false, Rows::some, 1>(
        none, none, tile, queries, queries + (kYRing - kXRing), scalars, places, offset, seen, walk.slope, scale,
        walk.ds_at(i, kTiles) + (r - step.base) * kDsRow);
  }
}

// Returns this lane's part of the gradient of cosine_scale.
template <int dim, class T, bool cosine>
DEVICE float march_with_queries(Walk<dim, T, cosine>& walk, int index) {
  const Stream<dim>& stream = walk.stream;
  const int lane = walk.lane, t = lane % 4, last_row = stream.height - 1;
  const int column = kTileColumns * (index + 1);  // of the queries; they see tiles `index` and index + 1
  const bool active = stream.first_column + column < stream.width, beyond = walk.active(kTiles);
  const int key_x = walk.key_column(kTiles) + lane / 4, safe_x = most(0, least(key_x, stream.width - 1));
  float columns[1][2];
  columns_seen(columns, walk, kTiles);
  // Two warps, that do not prepare the most queries, prepare a row of the tile beyond the strip each, for all.
  const auto leave_keys = [&](int i) {
#pragma unroll 1
    for (int half = index - 2; half >= 0 && half < 2; half += kTiles) {
      const int y = least(core::load_shared<int>(walk.step_at(i)) + half, last_row);
      const Args& f = walk.args.forward;
      const Quarter<dim> raw = load_quarter<dim>(token_at(f.k, walk.image(kK), y, safe_x), t);
      walk.meet_value(load_raw<dim>(token_at(f.v, walk.image(kV), y, safe_x), t, 0));
      const Angles<dim> angles = load_angles<dim>(stream.angles_at(y, safe_x - stream.first_column, t));
      float inverse_length;
      walk.leave_keys(i, kTiles, half, prepared<dim, T, cosine>(raw, angles, 1.0f, inverse_length));
    }
  };
  PairSums<dim> dq = {};
  float sum = 0, held = walk.exponent;  // held: the exponent of dq
  int base_before = 0, flags_before = 0;
#pragma unroll 1
  for (int i = -1; i <= walk.steps;) {
    Step step(walk.step_at(most(i, 0)));
    const bool ready = i < 0 || walk.begin(step);
    if (i >= 0 && ready) {
      Quarter<dim> values[2];
      const bool helps = beyond && i < walk.steps;
      if (helps)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          values[half] = load_raw<dim>(
              token_at(walk.args.forward.v, walk.image(kV), least(step.key + half, last_row), safe_x), t,
              walk.args.nothing);
      if (active && i > 0) {
#pragma unroll 1
        while (held > walk.exponent_before) {  // a new largest element: seldom
          const float down = fmaxf(walk.exponent_before - held, -100.0f), factor = core::exp2(down);
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
            for (int c = 0; c < dim / 8; ++c)
#pragma unroll
              for (int e = 0; e < 4; ++e) dq[pair][c][e] *= factor;
          held += down;
        }
#pragma unroll
        for (int eight = 0; eight < 2; ++eight)
          if (walk.active(index + 1 - eight))
            add_keys<dim, T, cosine>(dq, walk.keys_at(i - 1, index + 1 - eight), walk.ds_at(i - 1, index + 1 - eight),
                                     eight, flags_before);
      }
      if (helps) add_tile_beyond(walk, step, i, index, values, columns);
      if (active)
#pragma unroll 1
        for (int pair = 0; pair < step.done(); ++pair)
          sum += store_pair(dq, walk, base_before + 2 * pair, step.flags >> (Step::kInside + 2 * pair), column, held);
      base_before = step.base, flags_before = step.flags;
    }
    if (ready && beyond && i + 1 < walk.steps) leave_keys(i + 1);
    if (i >= 0) walk.prepare();
    walk.share_largest();
    if (ready) ++i;
  }
  return sum;
}

template <int dim, class T, bool cosine>
__global__ void __launch_bounds__(32 * kFusedWarps, 1) fused_kernel(const BackwardArgs args) {
  Walk<dim, T, cosine> walk(args);
  // The warps of queries have less to do, and are the first to be given rows to prepare.
  float sum = 0;
  if (walk.warp < kTiles) sum = march_with_queries(walk, walk.warp);
  else march_with_keys(walk, walk.warp - kTiles);
  // The block's part of the gradient of cosine_scale.
  sum = sum_of_warp(sum);
  core::sync_block();
  if (walk.lane == 0) core::store_shared<float>(walk.shared + kLargest + 4 * walk.warp, sum);
  core::sync_block();
  if (threadIdx.x != 0) return;
  Part part = {};
  for (int w = 0; w < kTiles; ++w) part.dcosine_scale += core::load_shared<float>(walk.shared + kLargest + 4 * w);
  const Place place = place_of(blockIdx.x, args.forward);
  const int64_t parts = (int64_t(place.image) * args.forward.heads + place.head) * args.parts_per_head;
  core::store_global<Part>(args.parts + parts + place.segment * args.forward.strips + place.strip, part);
}

// ---- host side -------------------------------------------------------------------------------------------------------
// Whether the ring holds what every step needs.
bool rows_fit(const Args& f) {
  for (int segment = 0; segment < f.segments; ++segment) {
    const int begin = segment * f.rows;
    const March march(begin, segment == f.segments - 1 ? f.height : begin + f.rows, f.height, f.window_rows);
    for (int i = 0; i < march.steps(); ++i)
      if (march.high(i) + 1 - march.needed(i) > kRing) return false;
  }
  return true;
}

// Whether every tile of keys is seen by queries of its 16 columns, if the first one begins at `begin`.
bool columns_fit(int begin, int width, int window) {
  for (; begin < width; begin += kTileColumns)
    if (!tile_fits(begin, width, width, window)) return false;
  return true;
}

}  // namespace

bool strips::plan_fused(BackwardArgs& args, const NeighborhoodAttention& a, int64_t most_bytes) {
  Args& f = args.forward;
  if (a.dim != kDim || f.window_rows > kMostFusedWindow || f.window_columns > kMostFusedWindow) return false;
  const int back = keys_reach_back(f.window_columns);
  int before = 0;  // columns by which the first strip's own queries begin before the image
  while (before < kTileColumns && !columns_fit(back - before - kTileColumns, f.width, f.window_columns)) ++before;
  if (before == kTileColumns) return false;
  args.first_strip = back - before - kTileColumns;
  f.strips = int(ceil_div(f.width - args.first_strip, kTileColumns * kTiles));
  f.rows = segment_rows(f.height, f.strips * a.batch * a.heads, core::multiprocessors(), kStep,
                        f.window_rows + 2 * kStep, kMostFusedRows);
  f.rows = most(f.rows, kLeastRows);
  f.segments = most(1, (f.height + f.rows - kLeastRows) / f.rows);
  const int rows = most(f.rows, f.height - (f.segments - 1) * f.rows);
  args.layout.row_table = (rows / 2 + 8) * Step::kBytes;  // behind the steps
  args.layout.bytes = kSteps + args.layout.row_table + (rows + 16) * (kDim / 2);
  args.parts_per_head = f.strips * f.segments;
  args.warps = kFusedWarps;
  return rows_fit(f) && int64_t(args.layout.bytes) <= most_bytes;
}

void strips::launch_fused(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call,
                          void* stream) {
  with_element_types(a, [&](auto element, auto cosine) {
    constexpr auto kernel = fused_kernel<kDim, decltype(element), decltype(cosine)::value>;
    launch_blocks(call + ", fused", kernel, args, a.batch, stream);
  });
}

}  // namespace hdit
