// The backward pass of the general path: no atomics, the same bits every time.
//
// 1. queries_kernel, over tiles of queries: dq, the notes of each query, and the parts of cosine_scale's gradient.
// 2. keys_kernel, over tiles of keys and the queries that see them: dk and dv. keys_kernel<true>: over tiles of
//    additional keys and segments of all queries, a sum for each segment; extras_kernel adds these up.
// 3. scales_kernel adds up the parts of cosine_scale's gradient, in double precision.
//
// All compute the softmax again. The weight of a key is exp2(logit − level)·norm: level is the base-2 lse, and norm,
// the inverse of what pass 1 finds that weights without it add up to, takes back what rounding did to the lse. The
// gradient of a logit is weight·(⟨dout, value⟩ − delta), delta = ⟨dout, out⟩ − dlse. Over a query's keys these add up
// to dlse but for `slip`, which is what rounding (of out, above all) did to delta: delta is corrected for pass 2, and
// so is cosine_scale's gradient. A query's notes are level, delta and norm.
#include "general.cuh"

namespace hdit {
namespace general {
namespace {

constexpr int kTiles = 5;  // in shared memory: own heads and those of the others, values and dout, weights

// ---- what the passes share ------------------------------------------------------------------------------------------
// Both products of a tile of queries with one of keys, all chunks: ⟨query, key⟩ and ⟨dout, value⟩. Begins with a
// barrier, and ends with the chunks in shared memory that belong to the gradients of this block. Every block, whichever
// of these it makes, adds the chunks up in one order: weights of both passes must be the same to the bit for norm to be
// theirs. kAhead: heads are fetched into registers before the barrier, while other warps still multiply.
template <class T, bool kCommon, bool kAhead>
struct Products {
  const Plan& plan;
  const Memory& memory;
  const Block& block;
  const Tile& own;
  const Tokens &own_heads, &own_values;
  const bool* own_mask;
  bool cosine, own_turned;

  DEVICE void bring_own(int heads_chunk, int values_chunk, bool first, bool last, bool lengths) const {
    Brought<T> brought;
    if (heads_chunk >= 0) {
      const Heads<const T> heads(own_heads, block, plan.dim, plan.angles, plan.wide);
      fetch(brought, heads, own, heads_chunk, own_mask, plan.columns.length);
      put(brought, memory.own, own, heads_chunk, own_turned ? memory.own_turns : 0, plan.angles);
      if (lengths) put_lengths(brought, memory.own_notes, cosine, first, last);
    }
    if (values_chunk >= 0) {
      const Heads<const T> values(own_values, block, plan.v_dim, 0, plan.wide);
      fetch(brought, values, own, values_chunk, own_mask, plan.columns.length);
      put(brought, memory.own_values, own, values_chunk, 0, 0);
    }
  }

  // prepare(): what else has to be in shared memory before the products are used; it may write after the first barrier.
  template <class Prepare>
  DEVICE void operator()(const Thread& thread, const Heads<const T>& heads, const Heads<const T>& values,
                         const Tile& tile, const bool* mask, bool turned, bool begin, bool needed,
                         float (&products)[4][8], float (&changes)[4][8], const Prepare& prepare) const {
    const int count = larger(plan.dim_chunks, plan.v_chunks);
    for (int i = 0; i < count + (count > 1); ++i) {
      const int chunk = i < count ? i : block.chunk;
      const int heads_chunk = chunk < plan.dim_chunks ? chunk : -1, values_chunk = chunk < plan.v_chunks ? chunk : -1;
      const bool first = i == 0, last = i == plan.dim_chunks - 1;
      Brought<T> head;
      if (kAhead) fetch(head, heads, tile, heads_chunk, mask, plan.columns.length);
      core::sync_block();
      if (kCommon) copy(memory.other_values, values, tile, values_chunk, mask, plan.columns.length);
      if (first) prepare();
      if (begin || count > 1) bring_own(heads_chunk, values_chunk, first, last, i < count);
      if (heads_chunk >= 0) {
        if (!kAhead) fetch(head, heads, tile, heads_chunk, mask, plan.columns.length);
        put(head, memory.other, tile, heads_chunk, turned ? memory.other_turns : 0, plan.angles);
        if (i < count) put_lengths(head, memory.other_notes, cosine, first, last);
      }
      if (kCommon) {
        core::copy_async_wait<0>();
      } else if (values_chunk >= 0) {
        Brought<T> value;
        fetch(value, values, tile, values_chunk, mask, plan.columns.length);
        put(value, memory.other_values, tile, values_chunk, 0, 0);
      }
      core::sync_block();
      if (!needed || i == count) continue;
      if (heads_chunk >= 0) multiply(thread, memory.own, memory.other, heads.pairs(heads_chunk), products);
      if (values_chunk >= 0 && !plan.alone && values.data != nullptr && own_values.data != nullptr)
        multiply(thread, memory.own_values, memory.other_values, values.pairs(values_chunk), changes);
    }
  }
};

// The gradient of an own head from `gradient`, the thread's pair of that of the prepared one. x̂ = x·n, n = rsqrt(Σx² +
// ε), has dx = n·(g − x̂·along), along = ⟨x̂, g⟩; rotations keep products, so that is taken before turning back.
template <class T>
DEVICE void write_gradient(const Heads<T>& result, const Thread& thread, const Memory& memory, const Block& block,
                           const Tile& own, int i, bool cosine, bool turned, float along, float factor,
                           float (&gradient)[8]) {
  const int slot = thread.own(i);
  if (cosine) {
    const float length = core::load_shared<float>(note_at(memory.own_notes, slot, 3));
    const uint32_t raw = pair_at(memory.own, slot, thread.member);
    const float4 first = core::load_shared<float4>(raw), second = core::load_shared<float4>(raw + kRowBytes / 2);
    const float x[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    const bool shown = length >= 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) gradient[e] = shown ? (gradient[e] - x[e] * length * along) * length : 0.0f;
  }
  const int pair = 8 * block.chunk + thread.member;
  if (turned) turn(memory.own_turns, own, slot, pair, result.r, -1.0f, gradient);
#pragma unroll
  for (int e = 0; e < 8; ++e) gradient[e] *= factor;
  result.write(result.at(own.y_of(slot), own.x_of(slot)), pair, gradient);
}

// ---- over queries ---------------------------------------------------------------------------------------------------
// level, delta and dlse of the own queries into their notes.
template <class T>
DEVICE void put_outputs(const Call& call, const Block& block, const Tile& own, const Memory& memory) {
  const NeighborhoodAttentionBackward& g = call.g;
  const Plan& plan = call.plan;
  const Heads<const T> douts(g.dout, block, plan.v_dim, 0, plan.wide);
  const Part part;
#pragma unroll 1
  for (int p = 0; p < 4; ++p) {
    const int slot = part.slot(p);
    const int y = own.row_class + own.near_row(slot) * own.row_dilation;
    const int x = own.column_class + own.near_column(slot) * own.column_dilation;
    const int64_t number = number_of(plan, block, y, x);
    const T* out = static_cast<const T*>(g.forward.out) + number * plan.v_dim;
    float delta = 0.0f;
    if (douts.data != nullptr && !plan.alone)
      for (int f = part.pair; f < plan.v_dim; f += 8)
        delta += core::to_float(core::load_global<T>(out + f)) *
                 core::to_float(core::load_global<T>(douts.at(y, x) + f));
    delta = sum_of_group(delta);
    if (part.pair != 0) continue;
    const float* const dlses = static_cast<const float*>(g.dlse);
    const float change = dlses == nullptr ? 0.0f : core::load_global<float>(dlses + number);
    const float lse = core::load_global<float>(static_cast<const float*>(g.forward.lse) + number);
    const float level = lse == -INFINITY ? 0.0f : lse * kLog2e;  // without any key: anything finite
    core::store_shared(note_at(memory.own_notes, slot, 0), level);
    core::store_shared(note_at(memory.own_notes, slot, 1), delta - change);
    core::store_shared(note_at(memory.own_notes, slot, 2), change);
  }
}

// Sums over the keys of a thread's four queries, this lane's: of weights, of weight·cosine, of logits' gradients and of
// these times the cosine.
struct Moments {
  float total[4] = {}, mean[4] = {}, slip[4] = {}, along[4] = {};
};

// Products become the gradients of logits over the keys' lengths.
template <class T>
DEVICE void change_queries(float (&products)[4][8], const float (&changes)[4][8], Moments& moments,
                           const Thread& thread, const Memory& memory, const Tile& keys, bool everywhere,
                           float factor) {
  float lengths[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) lengths[j] = core::load_shared<float>(note_at(memory.other_notes, thread.other(j), 3));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Box window = core::load_shared<Box>(memory.windows + 16 * thread.own(i));
    const float4 note = core::load_shared<float4>(note_at(memory.own_notes, thread.own(i), 0));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int slot = thread.other(j);
      const bool seen = lengths[j] >= 0.0f && (everywhere || window.holds(keys.row_of(slot), keys.column_of(slot)));
      const float cosine = seen ? products[i][j] * note.w * lengths[j] : 0.0f;
      const float weight = seen ? weight_of<T>(fmaf(cosine, factor, -note.x)) : 0.0f;
      const float change = seen ? weight * (changes[i][j] - note.y) : 0.0f;
      moments.total[i] += weight;
      moments.mean[i] += weight * cosine;
      moments.slip[i] += change;
      moments.along[i] += change * cosine;
      products[i][j] = seen ? change * lengths[j] : 0.0f;
    }
  }
}

// A block's part of cosine_scale's gradient from the threads' parts, in a fixed order. (Terms of both signs: in float32
// their sum would lose more than they have lost themselves.)
DEVICE void write_part(double part, const Memory& memory, double* to) {
  const int thread = threadIdx.x;
  core::sync_block();  // nobody reads the weights any more
  core::store_shared(memory.weights + 8 * thread, part);
  core::sync_block();
  double sum = 0.0;
  for (int i = 0; thread < 8 && i < kThreads / 8; ++i)
    sum += core::load_shared<double>(memory.weights + 8 * (thread + 8 * i));
  core::sync_block();
  if (thread < 8) core::store_shared(memory.weights + 8 * thread, sum);
  core::sync_block();
  if (thread != 0) return;
  for (int i = 1; i < 8; ++i) sum += core::load_shared<double>(memory.weights + 8 * i);
  core::store_global(to, sum);
}

template <class T, bool kCommon>
__global__ void __launch_bounds__(kThreads, 2) queries_kernel(const Call call) {
  const Plan plan = known<kCommon>(call.plan);
  const NeighborhoodAttention& args = call.g.forward;
  const Block block(plan);
  if (block.empty()) {
    if (threadIdx.x == 0 && block.chunk == 0) core::store_global(call.parts + block.tile, 0.0);
    return;
  }
  const Thread thread;
  const Memory memory(plan, kTiles);
  const Tile own = own_tile(plan, block);
  const bool cosine = args.cosine_scale != nullptr;
  const bool* const mask = mask_of(args, plan, block.batch);
  const float factor = factor_of(args, plan, block.head);
  const Products<T, kCommon, kCommon> multiply_tiles = {plan,   memory,      block,   own,    args.q,
                                                        call.g.dout, nullptr, cosine, true};

  if (threadIdx.x < kSlots) core::store_shared(memory.windows + 16 * threadIdx.x, window_of(plan, own, threadIdx.x));
  fill_turns(memory.own_turns, args, plan, own, block.head);
  put_outputs<T>(call, block, own, memory);
  const Box needed = keys_of(plan, own, 16 * thread.warp, 16 * thread.warp + 15);
  const Walk walk(keys_of(plan, own, 0, kSlots - 1), plan.other_log);
  const int extra_steps = (plan.extra + kSlots - 1) / kSlots;
  Moments moments;
  float sums[4][8] = {};
  for (int step = -extra_steps; step < walk.steps; ++step) {
    const bool extra = step < 0;
    const Tile tile = extra ? extra_tile(plan, (step + extra_steps) * kSlots)
                            : tile_at(plan, block, walk.row(step), walk.column(step), walk.log);
    const Units units = extra ? Units{0, kSlots / 4} : units_of(tile, needed);
    const Heads<const T> keys(extra ? args.extra_k : args.k, block, plan.dim, plan.angles, plan.wide);
    const Heads<const T> values(extra ? args.extra_v : args.v, block, plan.v_dim, 0, plan.wide);
    if (!extra) fill_turns(memory.other_turns, args, plan, tile, block.head);
    float products[4][8] = {}, changes[4][8] = {};
    const Thread here = thread.again();
    multiply_tiles(here, keys, values, tile, extra ? nullptr : mask, !extra, step == -extra_steps, units.any(),
                   products, changes, [] {});
    if (!units.any()) continue;
    change_queries<T>(products, changes, moments, here, memory, tile, extra, factor * kLog2e);
    put_weights(here, memory.weights, products);
    core::sync_warp();
    accumulate(here, memory.weights, memory.other, units, keys.pairs(block.chunk), sums);
  }

  const Block again(plan);
  const Tile own_again = own_tile(plan, again);
  const Thread lanes = thread.again();
  const Heads<T> dq(call.g.dq, again, plan.dim, plan.angles, plan.wide);
  double part = 0.0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slot = lanes.own(i);
    const float4 note = core::load_shared<float4>(note_at(memory.own_notes, slot, 0));
    const float total = sum_of_group(moments.total[i]), norm = total == 0.0f ? 0.0f : 1.0f / total;
    const float slip = sum_of_group(moments.slip[i]) * norm - note.z, mean = sum_of_group(moments.mean[i]) * norm;
    const float along = sum_of_group(moments.along[i]) * norm;
    if (!own_again.exists(slot)) continue;
    if (total != 0.0f) part += double(moments.along[i]) * norm - (lanes.member == 0 ? double(slip) * mean : 0.0);
    if (lanes.member == 0 && again.chunk == 0)
      core::store_global(call.notes + number_of(plan, again, own_again.y_of(slot), own_again.x_of(slot)),
                         make_float4(note.x, note.y + slip, norm, 0.0f));
    if (dq.data == nullptr) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[i][e] *= norm;
    write_gradient(dq, lanes, memory, again, own_again, i, cosine, true, along, factor, sums[i]);
  }
  if (again.chunk == 0) write_part(part * plan.scale, memory, call.parts + again.tile);
}

// ---- over keys ------------------------------------------------------------------------------------------------------
// Products become weights, and `changes` the gradients of logits over the queries' lengths. along: of the thread's
// keys, this lane's sum of these gradients times the cosine.
template <class T>
DEVICE void change_keys(float (&products)[4][8], float (&changes)[4][8], float (&along)[4], const Thread& thread,
                        const Memory& memory, const Tile& own, bool everywhere, float factor) {
  float lengths[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) lengths[i] = core::load_shared<float>(note_at(memory.own_notes, thread.own(i), 3));
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Box window = core::load_shared<Box>(memory.windows + 16 * thread.other(j));
    const float4 note = core::load_shared<float4>(note_at(memory.other_notes, thread.other(j), 0));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int slot = thread.own(i);
      const bool seen = lengths[i] >= 0.0f && note.w >= 0.0f &&
                        (everywhere || window.holds(own.row_of(slot), own.column_of(slot)));
      const float cosine = seen ? products[i][j] * note.w * lengths[i] : 0.0f;
      const float weight = seen ? weight_of<T>(fmaf(cosine, factor, -note.x)) * note.z : 0.0f;
      const float change = seen ? weight * (changes[i][j] - note.y) : 0.0f;
      along[i] += change * cosine;
      products[i][j] = weight;
      changes[i][j] = seen ? change * note.w : 0.0f;
    }
  }
}

// The notes and the windows of a tile of queries.
DEVICE void put_queries(const Call& call, const Block& block, const Tile& tile, const Memory& memory, bool windows) {
  const int slot = threadIdx.x;
  if (slot >= kSlots) return;
  float4 note = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (tile.exists(slot))
    note = core::load_global<float4>(call.notes + number_of(call.plan, block, tile.y_of(slot), tile.x_of(slot)));
  core::store_shared(note_at(memory.other_notes, slot, 0), note.x);
  core::store_shared(note_at(memory.other_notes, slot, 1), note.y);
  core::store_shared(note_at(memory.other_notes, slot, 2), note.z);
  core::store_shared(memory.windows + 16 * slot, windows ? window_of(call.plan, tile, slot) : Box{0, 0, 0, 0});
}

// A segment's sums for a tile of additional tokens: of the gradients of prepared keys and of values, and of `along`.
DEVICE void write_sums(const Call& call, const Block& block, int segment, const Thread& thread, const Tile& own, int i,
                       float along, const float (&dkeys)[8], const float (&dvalues)[8]) {
  const Plan& plan = call.plan;
  if (!own.exists(thread.own(i))) return;
  const int64_t row = ((segment * call.g.forward.batch + block.batch) * plan.heads + block.head) * plan.extra +
                      own.column_of(thread.own(i));
  float* const sums = call.sums + row * (plan.dim + plan.v_dim + 4);
  const int pair = 8 * block.chunk + thread.member;
  Heads<float>(sums, plan.dim, plan.angles, plan.wide).write(sums, pair, dkeys);
  Heads<float>(sums, plan.v_dim, 0, plan.wide).write(sums + plan.dim, pair, dvalues);
  if (thread.member == 0 && block.chunk == 0) core::store_global(sums + plan.dim + plan.v_dim, along);
}

// kExtra: blocks are spread over tiles of additional tokens (columns) and segments (rows), see extras_plan.
template <class T, bool kExtra, bool kCommon>
__global__ void __launch_bounds__(kThreads, 2) keys_kernel(const Call call) {
  const Plan plan = known<kCommon>(call.plan);
  const NeighborhoodAttention& args = call.g.forward;
  const Block block(plan);
  if (!kExtra && block.empty()) return;
  const Thread thread;
  const Memory memory(plan, kTiles);
  const Tile own = kExtra ? extra_tile(plan, block.column) : own_tile(plan, block);
  const bool cosine = args.cosine_scale != nullptr;
  const float factor = factor_of(args, plan, block.head);
  const Products<T, kCommon, false> multiply_tiles = {  // sums of keys and values leave no registers to be ahead
      plan, memory, block, own, kExtra ? args.extra_k : args.k, kExtra ? args.extra_v : args.v,
      kExtra ? nullptr : mask_of(args, plan, block.batch), cosine, !kExtra};

  if (!kExtra) fill_turns(memory.own_turns, args, plan, own, block.head);
  const Box whole = {0, plan.rows.length, 0, plan.columns.length};
  const Box needed = kExtra ? whole : readers_of(plan, own, 16 * thread.warp, 16 * thread.warp + 15);
  const Walk walk(kExtra ? whole : readers_of(plan, own, 0, kSlots - 1), plan.other_log);
  const int begin = kExtra ? block.row * plan.per_segment : 0;
  const int end = kExtra ? smaller(begin + plan.per_segment, walk.steps) : walk.steps;
  float along[4] = {}, dkeys[4][8] = {}, dvalues[4][8] = {};
  for (int step = begin; step < end; ++step) {
    const Tile tile = tile_at(plan, block, walk.row(step), walk.column(step), walk.log);
    const Units units = units_of(tile, needed);
    const Heads<const T> queries(args.q, block, plan.dim, plan.angles, plan.wide);
    const Heads<const T> douts(call.g.dout, block, plan.v_dim, 0, plan.wide);
    fill_turns(memory.other_turns, args, plan, tile, block.head);
    float products[4][8] = {}, changes[4][8] = {};
    const Thread here = thread.again();
    multiply_tiles(here, queries, douts, tile, nullptr, true, step == begin, units.any(), products, changes,
                   [&] { put_queries(call, block, tile, memory, !kExtra); });
    if (!units.any()) continue;
    change_keys<T>(products, changes, along, here, memory, own, kExtra, factor * kLog2e);
    put_weights(here, memory.weights, products);
    core::sync_warp();
    if (douts.data != nullptr)
      accumulate(here, memory.weights, memory.other_values, units, douts.pairs(block.chunk), dvalues);
    core::sync_warp();
    put_weights(here, memory.weights, changes);
    core::sync_warp();
    accumulate(here, memory.weights, memory.other, units, queries.pairs(block.chunk), dkeys);
  }

  const Block again(plan);
  const Tile own_again = kExtra ? extra_tile(plan, again.column) : own_tile(plan, again);
  const Thread lanes = thread.again();
  const Heads<T> dk(call.g.dk, again, plan.dim, plan.angles, plan.wide), dv(call.g.dv, again, plan.v_dim, 0, plan.wide);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    along[i] = sum_of_group(along[i]);
    const int slot = lanes.own(i);
    if (kExtra) {
      write_sums(call, again, again.row, lanes, own_again, i, along[i], dkeys[i], dvalues[i]);
    } else if (own_again.exists(slot)) {
      if (dv.data != nullptr)
        dv.write(dv.at(own_again.y_of(slot), own_again.x_of(slot)), 8 * again.chunk + lanes.member, dvalues[i]);
      if (dk.data != nullptr && again.chunk < plan.dim_chunks)
        write_gradient(dk, lanes, memory, again, own_again, i, cosine, true, along[i], factor, dkeys[i]);
    }
  }
}

// ---- sums -----------------------------------------------------------------------------------------------------------
// The gradients of one additional token from the segments' sums.
template <class T>
__global__ void __launch_bounds__(kThreads) extras_kernel(const Call call) {
  const Plan& plan = call.plan;
  const NeighborhoodAttention& args = call.g.forward;
  struct {
    int64_t batch;
    int head;
  } where = {};
  const int token = int(blockIdx.x % plan.extra);
  where.head = int(blockIdx.x / plan.extra % plan.heads), where.batch = blockIdx.x / plan.extra / plan.heads;
  const int64_t width = plan.dim + plan.v_dim + 4, between = args.batch * plan.heads * plan.extra * width;
  const float* const sums = call.sums + ((where.batch * plan.heads + where.head) * plan.extra + token) * width;
  const auto sum_at = [&](int f) {
    float sum = 0.0f;
    for (int segment = 0; segment < plan.segments; ++segment)
      sum += core::load_global<float>(sums + segment * between + f);
    return sum;
  };
  const Heads<const T> keys(args.extra_k, where, plan.dim, 0, false);
  const Heads<T> dk(call.g.dextra_k, where, plan.dim, 0, false), dv(call.g.dextra_v, where, plan.v_dim, 0, false);
  if (dv.data != nullptr)
    for (int f = threadIdx.x; f < plan.v_dim; f += kThreads)
      core::store_global(dv.at(0, token) + f, core::from_float<T>(sum_at(plan.dim + f)));
  if (dk.data == nullptr) return;
  float squares = 0.0f;
  const bool cosine = args.cosine_scale != nullptr;
  const auto feature = [&](int f) { return core::to_float(core::load_global<T>(keys.at(0, token) + f)); };
  for (int f = 0; cosine && f < plan.dim; ++f) squares += feature(f) * feature(f);
  const float length = cosine ? core::inverse_root(squares + kEpsilon) : 1.0f;
  const float along = cosine ? sum_at(plan.dim + plan.v_dim) : 0.0f;
  const float factor = factor_of(args, plan, where.head);
  for (int f = threadIdx.x; f < plan.dim; f += kThreads) {
    const float gradient = (sum_at(f) - feature(f) * length * along) * length * factor;
    core::store_global(dk.at(0, token) + f, core::from_float<T>(gradient));
  }
}

__global__ void __launch_bounds__(kThreads) scales_kernel(const double* parts, int64_t count, float* sums) {
  const uint32_t shared = core::dynamic_shared();
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    sum += core::load_global<double>(parts + blockIdx.x * count + i);
  core::store_shared(shared + 8 * threadIdx.x, sum);
  core::sync_block();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) sum += core::load_shared<double>(shared + 8 * i);
  core::store_global(sums + blockIdx.x, float(sum));
}

// ---- host side ------------------------------------------------------------------------------------------------------
int dim_chunks(const Plan& plan) { return plan.dim_chunks; }
int most_chunks(const Plan& plan) { return plan.dim_chunks > plan.v_chunks ? plan.dim_chunks : plan.v_chunks; }

// Own tiles are 64 additional tokens, and for each of these there is a block for each segment of the queries: enough
// blocks for a device, and no more, since each writes its sums.
Plan extras_plan(const NeighborhoodAttentionBackward& g) {
  constexpr int64_t kBlocks = 512;
  Plan plan = plan_of(g, most_chunks);
  plan.rows.dilation = plan.columns.dilation = 1;
  plan.own_log = 6, plan.across = (plan.extra + kSlots - 1) / kSlots;
  const int64_t tiles =
      ceil_div(plan.rows.length, kSlots >> plan.other_log) * ceil_div(plan.columns.length, 1 << plan.other_log);
  const int64_t others = int64_t(plan.across) * plan.chunks * plan.heads * g.forward.batch;
  const int64_t wanted = others == 0 ? 1 : ceil_div(kBlocks, others);
  plan.per_segment = int(ceil_div(tiles, wanted < tiles ? wanted : tiles));
  plan.segments = plan.down = int(ceil_div(tiles, plan.per_segment));
  return plan;
}

bool wants_extras(const NeighborhoodAttentionBackward& g) {
  return g.forward.extra > 0 && (g.dextra_k.data != nullptr || g.dextra_v.data != nullptr);
}

// Sizes in bytes of what the workspace holds, one behind the other.
struct Workspace {
  int64_t notes, parts, sums;
  explicit Workspace(const NeighborhoodAttentionBackward& g) {
    const NeighborhoodAttention& a = g.forward;
    notes = a.batch * a.rows.length * a.columns.length * a.heads * int64_t(sizeof(float4));
    parts = ceil_div(a.batch * a.heads * tiles_of_head(plan_of(g, dim_chunks)), 2) * 16;
    sums = !wants_extras(g) ? 0 : extras_plan(g).segments * a.batch * a.heads * a.extra * (a.dim + a.v_dim + 4) * 4;
  }
};

template <class T>
void launch_all(const NeighborhoodAttentionBackward& g, void* workspace, void* stream) {
  const NeighborhoodAttention& a = g.forward;
  const Workspace sizes(g);
  char* const at = static_cast<char*>(workspace);
  Call call = {g, plan_of(g, dim_chunks), reinterpret_cast<float4*>(at), reinterpret_cast<double*>(at + sizes.notes),
               reinterpret_cast<float*>(at + sizes.notes + sizes.parts)};
  const auto run = [&](const char* name, void (*kernel)(const Call), unsigned blocks) {
    core::launch(describe(name, a), kernel, dim3(blocks), dim3(kThreads), shared_bytes(call.plan, kTiles), stream,
                 call);
  };
  const bool common = is_common<T>(call.plan);
  run("neighborhood_attention_backward (queries)", common ? queries_kernel<T, kCommonOf<T>> : queries_kernel<T, false>,
      blocks_of(call.plan, a.batch));
  if (g.dcosine_scale != nullptr)
    core::launch(describe("neighborhood_attention_backward (scales)", a), scales_kernel,
                 dim3(unsigned(a.batch * a.heads)), dim3(kThreads), 8 * kThreads, stream, call.parts,
                 tiles_of_head(call.plan), static_cast<float*>(g.dcosine_scale));
  if (g.dk.data != nullptr || g.dv.data != nullptr) {
    call.plan = plan_of(g, most_chunks);
    run("neighborhood_attention_backward (keys)",
        common ? keys_kernel<T, false, kCommonOf<T>> : keys_kernel<T, false, false>, blocks_of(call.plan, a.batch));
  }
  if (!wants_extras(g)) return;
  call.plan = extras_plan(g);
  run("neighborhood_attention_backward (additional keys)", keys_kernel<T, true, false>, blocks_of(call.plan, a.batch));
  run("neighborhood_attention_backward (sums of additional keys)", extras_kernel<T>,
      unsigned(a.batch * a.heads * a.extra));
}

}  // namespace

int64_t workspace_of(const NeighborhoodAttentionBackward& g) {
  const Workspace sizes(g);
  return sizes.notes + sizes.parts + sizes.sums;
}

void backward(const NeighborhoodAttentionBackward& g, void* workspace, void* stream) {
  const NeighborhoodAttention& a = g.forward;
  if (a.batch * a.heads * a.rows.length * a.columns.length == 0) return;
  with_element_type(a.dtype, [&](auto element) { launch_all<decltype(element)>(g, workspace, stream); });
}

}  // namespace general

// ---- the entry points -----------------------------------------------------------------------------------------------
void neighborhood_attention_forward_cuda(const NeighborhoodAttention& args, int device, void* stream) {
  const DeviceGuard guard(device, general::describe("neighborhood_attention_forward", args));
  if (!neighborhood_attention_strips_forward_cuda(args, stream)) general::forward(args, stream);
}

int64_t neighborhood_attention_workspace_cuda(const NeighborhoodAttentionBackward& args) {
  const int64_t strips = neighborhood_attention_strips_workspace_cuda(args), general = general::workspace_of(args);
  return strips > general ? strips : general;
}

void neighborhood_attention_backward_cuda(const NeighborhoodAttentionBackward& args, void* workspace, int device,
                                          void* stream) {
  const DeviceGuard guard(device, general::describe("neighborhood_attention_backward", args.forward));
  if (!neighborhood_attention_strips_backward_cuda(args, workspace, stream)) general::backward(args, workspace, stream);
}

}  // namespace hdit
