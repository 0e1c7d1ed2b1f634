// The forward pass of the general path: a block owns a tile of queries and walks over the additional keys and over the
// tiles of keys that any of its queries sees, with a running maximum of the logits. The head of general.cuh tells the
// rest.
#include "general.cuh"

namespace hdit {
namespace general {
namespace {

constexpr int kTiles = 4;  // in shared memory: queries, keys, values, weights

// The state of a thread's four queries: its lane's part of the denominators, and the sums of weighted values over them.
struct Softmax {
  float top[4], total[4], sums[4][8];
  DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      top[i] = kLowest, total[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] = 0.0f;
    }
  }
};

// Products become weights, of base-2 logits less the running maximum. everywhere: all queries see all that is not
// hidden.
template <class T>
DEVICE void weigh(Softmax& state, float (&products)[4][8], const Thread& thread, const Memory& memory, const Tile& keys,
                  bool everywhere, float factor) {
  float lengths[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) lengths[j] = core::load_shared<float>(note_at(memory.other_notes, thread.other(j), 3));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Box window = core::load_shared<Box>(memory.windows + 16 * thread.own(i));
    const float own_factor = factor * core::load_shared<float>(note_at(memory.own_notes, thread.own(i), 3));
    float highest = state.top[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int slot = thread.other(j);
      const bool seen = lengths[j] >= 0.0f && (everywhere || window.holds(keys.row_of(slot), keys.column_of(slot)));
      products[i][j] = seen ? products[i][j] * own_factor * lengths[j] : -INFINITY;
      highest = larger(products[i][j], highest);
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) highest = larger(core::shuffle_xor(highest, mask), highest);
    const float shrink = weight_of<T>(state.top[i] - highest);
    state.top[i] = highest;
    state.total[i] *= shrink;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      state.sums[i][j] *= shrink;
      products[i][j] = weight_of<T>(products[i][j] - highest);
      state.total[i] += products[i][j];
    }
  }
}

// A query without any key gives 0 and −∞.
template <class T>
DEVICE void finish(Softmax& state, const Thread& thread, const Block& block, const Tile& own,
                   const NeighborhoodAttention& args, const Plan& plan) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float total = sum_of_group(state.total[i]), inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int slot = thread.own(i);
    if (!own.exists(slot)) continue;
    const int64_t number = number_of(plan, block, own.y_of(slot), own.x_of(slot));
#pragma unroll
    for (int e = 0; e < 8; ++e) state.sums[i][e] *= inverse;
    const Heads<T> out(static_cast<T*>(args.out) + number * plan.v_dim, plan.v_dim, 0, plan.wide);
    out.write(out.data, 8 * block.chunk + thread.member, state.sums[i]);
    if (thread.member == 0 && block.chunk == 0)
      core::store_global(static_cast<float*>(args.lse) + number,
                         total == 0.0f ? -INFINITY : (log2_exact(total) + state.top[i]) * kLn2);
  }
}

// In the common case registers for three blocks on an SM, as many as the shared memory of an H100 holds.
template <class T, bool kCommon>
__global__ void __launch_bounds__(kThreads, kCommon ? 3 : 2) forward_kernel(const Call call) {
  const Plan plan = known<kCommon>(call.plan);
  const NeighborhoodAttention& args = call.g.forward;
  const Block block(plan);
  if (block.empty()) return;
  const Thread thread;
  const Memory memory(plan, kTiles);
  const Tile own = own_tile(plan, block);
  const bool cosine = args.cosine_scale != nullptr;
  const bool* const mask = mask_of(args, plan, block.batch);
  const float factor = factor_of(args, plan, block.head) * kLog2e;
  const Heads<const T> queries(args.q, block, plan.dim, plan.angles, plan.wide);

  if (threadIdx.x < kSlots) core::store_shared(memory.windows + 16 * threadIdx.x, window_of(plan, own, threadIdx.x));
  fill_turns(memory.own_turns, args, plan, own, block.head);
  const Box needed = keys_of(plan, own, 16 * thread.warp, 16 * thread.warp + 15);
  const Walk walk(keys_of(plan, own, 0, kSlots - 1), plan.other_log);
  const int extra_steps = (plan.extra + kSlots - 1) / kSlots;
  Softmax state;
  for (int step = -extra_steps; step < walk.steps; ++step) {
    const bool extra = step < 0;
    const Tile tile = extra ? extra_tile(plan, (step + extra_steps) * kSlots)
                            : tile_at(plan, block, walk.row(step), walk.column(step), walk.log);
    const Units units = extra ? Units{0, kSlots / 4} : units_of(tile, needed);
    const Heads<const T> keys(extra ? args.extra_k : args.k, block, plan.dim, plan.angles, plan.wide);
    const Heads<const T> values(extra ? args.extra_v : args.v, block, plan.v_dim, 0, plan.wide);
    const bool* const shown = extra ? nullptr : mask;
    float products[4][8] = {};
    const Thread here = thread.again();
    for (int chunk = 0; chunk < plan.dim_chunks; ++chunk) {
      const bool last = chunk == plan.dim_chunks - 1;
      if (chunk == 0 && !extra) fill_turns(memory.other_turns, args, plan, tile, block.head);
      Brought<T> key;
      fetch(key, keys, tile, chunk, shown, plan.columns.length);
      core::sync_block();
      if (kCommon) copy(memory.other_values, values, tile, block.chunk, shown, plan.columns.length);
      if (step == -extra_steps || plan.dim_chunks > 1) {
        Brought<T> query;
        fetch(query, queries, own, chunk, nullptr, 0);
        put(query, memory.own, own, chunk, memory.own_turns, plan.angles);
        put_lengths(query, memory.own_notes, cosine, chunk == 0, last);
      }
      put(key, memory.other, tile, chunk, extra ? 0 : memory.other_turns, plan.angles);
      put_lengths(key, memory.other_notes, cosine, chunk == 0, last);
      if (kCommon) {
        core::copy_async_wait<0>();
      } else if (last) {
        Brought<T> value;
        fetch(value, values, tile, block.chunk, shown, plan.columns.length);
        put(value, memory.other_values, tile, 0, 0, 0);
      }
      core::sync_block();
      if (units.any()) multiply(here, memory.own, memory.other, keys.pairs(chunk), products);
    }
    if (!units.any()) continue;
    weigh<T>(state, products, here, memory, tile, extra, factor);
    put_weights(here, memory.weights, products);
    core::sync_warp();
    accumulate(here, memory.weights, memory.other_values, units, values.pairs(block.chunk), state.sums);
  }
  const Block again(plan);
  finish<T>(state, thread.again(), again, own_tile(plan, again), args, plan);
}

// ---- host side ------------------------------------------------------------------------------------------------------
Axis axis_of(const Window& w) { return {int(w.length), int(w.kernel), int(w.stride), int(w.dilation), w.causal}; }

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Along one axis, a walk that begins with the first key that own token 0 sees: the tiles of `other` that own tokens
// first … first + count − 1 see, away from borders.
int64_t met(const Axis& a, int64_t first, int64_t count, int64_t other) {
  const int64_t size = pieces(a.length, a.dilation), end = first + count + a.kernel + a.stride - 2;
  return pieces(end < size ? end : size, other) - (first < size ? first : size - 1) / other;
}

// The shapes of tiles that make the least work, the squarer ones first: a warp multiplies where one of its 16 tokens
// sees a tile, and to bring a tile costs as much as half of all four warps' products. Turns may take 8 KiB of shared
// memory a tile.
void choose_tiles(Plan& plan) {
  int64_t least = INT64_MAX;
  for (const int own : {3, 2, 4, 1, 5, 0, 6})
    for (const int other : {3, 4, 2, 5, 1, 6, 0}) {
      if (turns_bytes(plan.angles, own) > 8192 || turns_bytes(plan.angles, other) > 8192) continue;
      const int64_t columns = 1 << own, rows = kSlots >> own;
      int64_t work = 2 * met(plan.rows, 0, rows, kSlots >> other) * met(plan.columns, 0, columns, 1 << other);
      for (int warp = 0; warp < 4; ++warp)
        work += met(plan.rows, 16 * warp / columns, columns < 16 ? 16 / columns : 1, kSlots >> other) *
                met(plan.columns, 16 * warp % columns, columns < 16 ? columns : 16, 1 << other);
      plan.down = int(pieces(pieces(plan.rows.length, plan.rows.dilation), rows));
      plan.across = int(pieces(pieces(plan.columns.length, plan.columns.dilation), columns));
      if (work * plan.down * plan.across >= least) continue;
      least = work * plan.down * plan.across;
      plan.own_log = own, plan.other_log = other;
    }
  plan.down = int(pieces(pieces(plan.rows.length, plan.rows.dilation), kSlots >> plan.own_log));
  plan.across = int(pieces(pieces(plan.columns.length, plan.columns.dilation), 1 << plan.own_log));
}

// Whether four features of any head can be read or written at once.
bool fours(const void* data, int64_t size, int64_t strides, DType dtype) {
  const uintptr_t bytes = dtype == DType::float32 ? 16 : 8;
  return data == nullptr || (reinterpret_cast<uintptr_t>(data) % bytes == 0 && size % 4 == 0 && strides % 4 == 0);
}
bool fours(const Tokens& t, int64_t size, bool grid, DType dtype) {
  return fours(t.data, size, t.batch_stride | (grid ? t.height_stride : 0) | t.width_stride | t.head_stride, dtype);
}

}  // namespace

Plan plan_of(const NeighborhoodAttentionBackward& g, int (*chunks)(const Plan&)) {
  const NeighborhoodAttention& a = g.forward;
  Plan plan = {};
  plan.rows = axis_of(a.rows), plan.columns = axis_of(a.columns);
  plan.heads = int(a.heads), plan.dim = int(a.dim), plan.v_dim = int(a.v_dim);
  plan.angles = int(a.angles), plan.extra = int(a.extra), plan.scale = float(a.scale);
  plan.dim_chunks = int(pieces(a.dim, kFeatures)), plan.v_chunks = int(pieces(a.v_dim, kFeatures));
  plan.chunks = chunks(plan);
  plan.wide = a.angles % 2 == 0 && fours(a.out, a.v_dim, 0, a.dtype);
  for (const Tokens* t : {&a.q, &a.k, &g.dq, &g.dk}) plan.wide = plan.wide && fours(*t, a.dim, true, a.dtype);
  for (const Tokens* t : {&a.v, &g.dout, &g.dv}) plan.wide = plan.wide && fours(*t, a.v_dim, true, a.dtype);
  plan.wide = plan.wide && fours(a.extra_k, a.dim, false, a.dtype) && fours(a.extra_v, a.v_dim, false, a.dtype);
  plan.alone = a.rows.kernel == 1 && a.columns.kernel == 1 && a.extra == 0;
  choose_tiles(plan);
  return plan;
}

uint32_t shared_bytes(const Plan& plan, int tiles) {
  return Memory::bytes(tiles) + turns_bytes(plan.angles, plan.own_log) + turns_bytes(plan.angles, plan.other_log);
}

int64_t tiles_of_head(const Plan& plan) {
  return int64_t(plan.down) * plan.across * plan.rows.dilation * plan.columns.dilation;
}

unsigned blocks_of(const Plan& plan, int64_t batch) {
  return unsigned(tiles_of_head(plan) * plan.chunks * plan.heads * batch);
}

std::string describe(const char* name, const NeighborhoodAttention& args) {
  std::string text;
  for (const int64_t size : {args.batch, args.rows.length, args.columns.length, args.heads, args.dim})
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  return std::string(name) + " of q (" + text + "), kernel_size (" + std::to_string(args.rows.kernel) + ", " +
         std::to_string(args.columns.kernel) + ")";
}

void forward(const NeighborhoodAttention& args, void* stream) {
  Call call = {};
  call.g.forward = args;
  call.plan = plan_of(call.g, [](const Plan& plan) { return plan.v_chunks; });
  if (blocks_of(call.plan, args.batch) == 0) return;
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = is_common<T>(call.plan) ? forward_kernel<T, kCommonOf<T>> : forward_kernel<T, false>;
    core::launch(describe("neighborhood_attention_forward", args), kernel,
                 dim3(blocks_of(call.plan, args.batch)), dim3(kThreads), shared_bytes(call.plan, kTiles), stream, call);
  });
}

}  // namespace general
}  // namespace hdit
