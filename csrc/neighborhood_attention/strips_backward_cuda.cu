// The fast path of neighborhood attention's backward pass: two kernels that march down strips, the same bits every time.
//
// 1. queries_kernel: dq, and notes for the second. A warp owns tiles of 2 × 8 queries, whose window is window_rows + 1 rows
//    of 16 keys. Rows of prepared keys and of values stream through a ring in shared memory.
// 2. keys_kernel: dk and dv. A warp owns tiles of 2 × 8 keys. The queries that see them are a contiguous range of rows
//    (more than the window at a border, so that nothing has to be added back) and of at most 16 columns: the host cuts the
//    strips so (columns_of_keys). Rows of prepared queries and of dout stream through the ring.
// 3. sum_kernel: the gradient of cosine_scale from one number of each block of the first, in a fixed order.
//
// Both compute logits s = ⟨q', k'⟩ of prepared (unit, rotated) heads and weights p = exp(factor·s − lse) again, then
// ds = p·(⟨dout, v⟩ − delta), delta = ⟨dout, out⟩ − dlse. Accumulators of one product are operands of the next as they are.
// dq and dk end with the gradients of rotation and normalisation: with y = x·n, dx = n·(g − y·⟨y, g⟩); and ⟨q', dq'⟩ is
// what the query adds to the gradient of cosine_scale.
//
// ds is rounded to float16 where q' and k' are (always but for plain bfloat16), and then scaled by powers of two that keep
// it in float16's range: in the first kernel for each query by the length of its dout, in the second for each key by the
// length of its value and the largest of dout and delta in the image. The scale leaves again in float32.
//
// A NaN or an infinity in a token may reach the gradients of tokens that share a tile with those that see it: what is masked
// becomes zero, but zero times NaN is NaN in a product of tiles.
#include "strips.cuh"

namespace hdit {
namespace {

using namespace strips;

constexpr int kMostWarps = 4;          // of a block: strips of 8·warps columns
constexpr int kStep = 2;               // rows that a block advances by
constexpr int kBlocksPerProcessor = 2;
constexpr int kProcessors = 132;       // of an H200; only to cut the rows into segments

// What a block of queries_kernel leaves for the others: 16 bytes.
struct alignas(16) Part {
  float dcosine_scale;        // short of `scale`
  float dout_squared, delta;  // the largest squared length of dout, and magnitude of delta
  float unused;
};

// What a block has in shared memory: ring of prepared tokens, ring of raw ones, rings of scalars (keys_kernel), tables, sums.
struct Layout {
  int columns, ring;  // of a ring: tokens in a row, rows
  uint32_t y_ring, scalars, column_table, row_table, sums, bytes;
};

struct BackwardArgs {
  Args forward;  // `strips`, `segments`, `rows` are those of the kernel that it is given to
  Tensor out, dout, dq, dk, dv;
  const float* dlse;      // (batch, height, width, heads) or null
  float* neg_delta;       // the same, in the workspace
  Part* parts;            // (batch · heads, blocks of the queries)
  float* dcosine_scale;   // (batch, heads) or null
  Layout layout;
  int parts_per_head;
  int first_strip, last_strip;  // keys: the columns at which the first and the last strip begin
  uint32_t nothing;  // 0, which the compiler does not know: x | nothing has a register of its own, else loaded words are moved
};

// Position of a token's head in (batch, height, width, heads) tensors.
DEVICE int64_t scalar_at(const Args& args, const Place& place, int y, int x) {
  return ((int64_t(place.image) * args.height + y) * args.width + x) * args.heads + place.head;
}

DEVICE char* token_at(const Tensor& x, char* image, int row, int column) {
  return image + row * x.height_stride + int64_t(column) * x.width_stride;
}

template <class T>
DEVICE float dot_of_words(uint32_t a, uint32_t b, float sum) {
  sum = fmaf(low<T>(a), low<T>(b), sum);
  return fmaf(high<T>(a), high<T>(b), sum);
}

// ---- rows of two tensors on their way through a ring -------------------------------------------------------------------
// x is prepared there, y stays as it is. A ring row holds `columns` tokens, a multiple of 8: 8 tokens to a warp at a time,
// four lanes to each.
template <int dim>
struct Stream {
  static constexpr int kToken = 2 * dim, kCopies = dim / 32;
  Tensor x, y;
  char *x_image, *y_image;
  uint32_t x_ring, y_ring, row_table, column_table;
  int first_row, first_column, columns, ring, height, width, window_rows, window_columns;

  DEVICE int row_bytes() const { return columns * kToken; }
  DEVICE uint32_t place_of_token(int slot, int column) const {
    return uint32_t(slot * columns + column) * kToken + swizzle<dim>(column) * 16;
  }
  DEVICE uint32_t angles_at(int row, int column, int t) const {
    return angles_of<dim>(row_table, row - first_row, column_table, column, t);
  }

  // f(row, its slot, ring column) for every token of `count` rows; `slot` is that of `row`.
  template <class F>
  DEVICE void tokens(int row, int count, int slot, F f) const {
    const int groups = columns / 8, warp = core::uniform(threadIdx.x / 32), warps = blockDim.x / 32;
    int i = 0, group = warp;  // i: rows from `row`
    while (group >= groups) group -= groups, ++i;
#pragma unroll 1
    while (i < count) {
      const int slot_of_row = slot + i >= ring ? slot + i - ring : slot + i;
      f(row + i, slot_of_row, group * 8 + int(threadIdx.x) % 32 / 4);
      group += warps;
      while (group >= groups) group -= groups, ++i;
    }
  }

  // Starts the copies of rows `row` … (as wrapped); more(row, column in the image, slot · columns + ring column).
  template <class More>
  DEVICE void load(int row, int count, int slot, More more) const {
    const int t = threadIdx.x % 4;
    tokens(row, count, slot, [&](int at_row, int at_slot, int column) {
      const int image_row = wrapped(at_row, height, window_rows);
      const int image_column = wrapped(first_column + column, width, window_columns);
      const uint32_t to = place_of_token(at_slot, column);
      const char* from_x = token_at(x, x_image, image_row, image_column) + 16 * t;
      const char* from_y = token_at(y, y_image, image_row, image_column) + 16 * t;
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        core::copy_async_16((x_ring + to) ^ (4 * c + t) << 4, from_x + 64 * c);
        core::copy_async_16((y_ring + to) ^ (4 * c + t) << 4, from_y + 64 * c);
      }
      more(image_row, image_column, at_slot * columns + column);
    });
  }

  // Prepares what `load` with the same arguments copied, after copy_async_wait and by the same lanes.
  template <class T, bool cosine, class More>
  DEVICE void prepare(int row, int count, int slot, More more) const {
    const int t = threadIdx.x % 4;
    core::sync_warp();
    tokens(row, count, slot, [&](int at_row, int at_slot, int column) {
      const uint32_t at = x_ring + place_of_token(at_slot, column);
      const Quarter<dim> raw = load_quarter_shared<dim>(at, t);
      core::sync_warp();
      float inverse_length;
      store_prepared<dim>(
          at, t, prepared<dim, T, cosine>(raw, load_angles<dim>(angles_at(at_row, column, t)), 1.0f, inverse_length));
      more(at_slot * columns + column);
    });
  }
};

// ---- what both kernels do with tiles -----------------------------------------------------------------------------------
// A tile's 16 tokens as the left operand of products over features: token g is row g (y) or 8 + g (y + 1) of fragments.
template <int dim>
using Fragments = uint32_t[dim / 16][4];

template <int dim>
DEVICE void put(Fragments<dim>& fragments, int half, const Quarter<dim>& x) {
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) fragments[c / 2][half + 2 * (c % 2)] = x.word[c];
}

template <int dim>
DEVICE Quarter<dim> take(const Fragments<dim>& fragments, int half) {
  Quarter<dim> x;
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) x.word[c] = fragments[c / 2][half + 2 * (c % 2)];
  return x;
}

// A quarter of a raw token in an order of features of its own: 8 of each 32.
template <int dim>
DEVICE Quarter<dim> load_raw(const char* token, int t, uint32_t nothing) {
  Quarter<dim> x;
#pragma unroll
  for (int c = 0; c < dim / 32; ++c) {
    const uint4 w = core::load_global<uint4>(token + 64 * c + 16 * t);
    x.word[4 * c] = w.x | nothing, x.word[4 * c + 1] = w.y | nothing;
    x.word[4 * c + 2] = w.z | nothing, x.word[4 * c + 3] = w.w | nothing;
  }
  return x;
}

// Where a lane finds 16 neighbouring tokens of a ring row, from its begin; dim·16 bytes are 8 tokens, which keep the swizzle.
template <int dim>
struct Sixteen {
  uint32_t prepared_at, raw_at, transposed_at;
  DEVICE Sixteen(int column, int lane) {
    const int g = lane / 4, t = lane % 4, near = column + lane % 8, aside = column + g, deep = column + lane % 16;
    prepared_at = near * (2 * dim) + ((lane / 8) ^ swizzle<dim>(near)) * 16;
    raw_at = aside * (2 * dim) + (t ^ swizzle<dim>(aside)) * 16;
    transposed_at = deep * (2 * dim) + ((lane / 16) ^ swizzle<dim>(deep)) * 16;
  }
};

// products[n] = start[n] + tile · (8 tokens n)ᵀ, for prepared tokens of a ring row.
template <int dim, class T>
DEVICE void times_prepared(float (&products)[2][4], const Fragments<dim>& tile, uint32_t at) {
  const float zero[4] = {0, 0, 0, 0};
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int c = 0; c < dim / 32; ++c) {
      uint32_t b[4];
      core::ldmatrix_x4(b, (at + n * (16 * dim)) ^ c << 6);
      if (c == 0) multiply<T>(products[n], zero, tile[0], b[0], b[1]);
      else multiply<T>(products[n], tile[2 * c], b[0], b[1]);
      multiply<T>(products[n], tile[2 * c + 1], b[2], b[3]);
    }
}

// The same for raw ones.
template <int dim, class T>
DEVICE void times_raw(float (&products)[2][4], const float (&start)[2][4], const Fragments<dim>& tile, uint32_t at) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int c = 0; c < dim / 32; ++c) {
      const uint4 b = core::load_shared<uint4>((at + n * (16 * dim)) ^ c << 6);
      if (c == 0) multiply<T>(products[n], start[n], tile[0], b.x, b.y);
      else multiply<T>(products[n], tile[2 * c], b.x, b.y);
      multiply<T>(products[n], tile[2 * c + 1], b.z, b.w);
    }
}

// sums += weights · (16 tokens), over tokens; sums[c]: the features of chunk c.
template <int dim, class T>
DEVICE void add_weighted(float (&sums)[dim / 8][4], const uint32_t (&weights)[4], uint32_t at) {
#pragma unroll
  for (int c = 0; c < dim / 16; ++c) {
    uint32_t b[4];
    core::ldmatrix_x4_trans(b, at ^ c << 5);
    multiply<T>(sums[2 * c], weights, b[0], b[1]);
    multiply<T>(sums[2 * c + 1], weights, b[2], b[3]);
  }
}

// Accumulators of two columns of 8 tokens as one left operand, and nothing where `seen` has no bits: [8 tokens][tile row].
template <class T>
DEVICE void pack_seen(uint32_t (&words)[4], const float (&x)[2][4], const uint32_t (&seen)[2][2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      words[2 * n + half] = pack<T>(x[n][2 * half], x[n][2 * half + 1]) & seen[n][half];
}

// factor · the gradient of a token, of which `sums` has that of the prepared one, row `half`; returns this lane's part of
// ⟨prepared, its gradient⟩.
template <int dim, class T, bool cosine>
DEVICE float gradient_of_token(Quarter<dim>& result, const float (&sums)[dim / 8][4], const Fragments<dim>& tile, int half,
                               float inverse_length, float factor, uint32_t angles_at) {
  constexpr int kPairs = dim / 16;
  float g[dim / 4], unit[dim / 4], part = 0;
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) g[2 * c] = sums[c][2 * half], g[2 * c + 1] = sums[c][2 * half + 1];
  if constexpr (cosine) {
    unpack<dim, Held<T, cosine>>(unit, take<dim>(tile, half));
#pragma unroll
    for (int i = 0; i < dim / 4; ++i) part = fmaf(g[i], unit[i], part);
    const float along = sum_of_token(part);
#pragma unroll
    for (int i = 0; i < dim / 4; ++i) g[i] = fmaf(-along, unit[i], g[i]);
  }
  const Angles<dim> angles = load_angles<dim>(angles_at);
  const float scale = factor * inverse_length;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float first = g[i] * scale, second = g[kPairs + i] * scale;
    g[i] = first * angles.cosine[i] + second * angles.sine[i];
    g[kPairs + i] = second * angles.cosine[i] - first * angles.sine[i];
  }
#pragma unroll
  for (int i = 2 * kPairs; i < dim / 4; ++i) g[i] *= scale;
  result = packed<dim, T>(g);
  return part;
}

// e with which x·2^e is at most about 2^top, given log2(x); at most 100 and at least −100.
DEVICE float exponent_for(float log2_of_x, float top) { return fminf(fmaxf(ceilf(top - log2_of_x) - 1.0f, -100.0f), 100.0f); }

DEVICE float max_of_warp(float x) {
#pragma unroll
  for (int m = 1; m < 32; m *= 2) x = fmaxf(x, core::shuffle_xor(x, m));
  return x;
}

DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int m = 1; m < 32; m *= 2) x += core::shuffle_xor(x, m);
  return x;
}

DEVICE float factor_of(const Args& args, int head) {
  return args.scale * (args.cosine_scale == nullptr ? 1.0f : core::load_global<float>(args.cosine_scale + head));
}

template <int dim>
DEVICE void set_up(Stream<dim>& stream, const BackwardArgs& args, uint32_t shared) {
  const Args& f = args.forward;
  const Layout& layout = args.layout;
  stream.x_ring = shared, stream.y_ring = shared + layout.y_ring;
  stream.row_table = shared + layout.row_table, stream.column_table = shared + layout.column_table;
  stream.columns = layout.columns, stream.ring = layout.ring;
  stream.height = f.height, stream.width = f.width;
  stream.window_rows = f.window_rows, stream.window_columns = f.window_columns;
}

// ---- 1: over queries -------------------------------------------------------------------------------------------------
constexpr float kTopOfQueries = -5.0f;

// 2 × 8 queries; token g of rows y and y + 1.
template <int dim>
struct QueryTile {
  Fragments<dim> q, dout;
  float inverse_length[2], level[2], exponent[2];  // level: what factor·log2(e)·s takes on to be log2(p·2^exponent)
  float start[2][4];                               // −delta, where products with values begin
};

// The largest length of dout and magnitude of delta, and the sum of what queries add to the gradient of cosine_scale.
struct Totals {
  float dcosine_scale, dout_squared, delta;
};

template <int dim, class T, bool cosine>
DEVICE void load_queries(QueryTile<dim>& tile, Totals& totals, const BackwardArgs& args, const Place& place,
                         const Stream<dim>& stream, int y, int x, int rows_left, int table_column) {
  const Args& f = args.forward;
  const int t = threadIdx.x % 4, safe_x = least(x, f.width - 1);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int safe_y = least(y + half, f.height - 1);
    const Quarter<dim> raw = load_quarter<dim>(token_at(f.q, image_of(f.q, place), safe_y, safe_x), t);
    const Quarter<dim> given =
        load_raw<dim>(token_at(args.dout, image_of(args.dout, place), safe_y, safe_x), t, args.nothing);
    const Quarter<dim> out = load_raw<dim>(token_at(args.out, image_of(args.out, place), safe_y, safe_x), t, 0);
    const int64_t at = scalar_at(f, place, safe_y, safe_x);
    put<dim>(tile.q, half,
             prepared<dim, T, cosine>(raw, load_angles<dim>(stream.angles_at(y + half, table_column, t)), 1.0f,
                                      tile.inverse_length[half]));
    put<dim>(tile.dout, half, given);
    float delta = 0, squared = 0;
#pragma unroll
    for (int c = 0; c < dim / 8; ++c) {
      delta = dot_of_words<T>(given.word[c], out.word[c], delta);
      squared = dot_of_words<T>(given.word[c], given.word[c], squared);
    }
    const float dlse = args.dlse == nullptr ? 0.0f : core::load_global<float>(args.dlse + at);
    const float neg_delta = dlse - sum_of_token(delta);
    squared = sum_of_token(squared);
    tile.level[half] = -kLog2E * core::load_global<float>(f.lse + at);
    tile.exponent[half] = 0;
    if constexpr (std::is_same_v<Held<T, cosine>, Float16>) {
      tile.exponent[half] = exponent_for(0.5f * core::log2(fmaf(dlse, dlse, squared)), kTopOfQueries);
      tile.level[half] += tile.exponent[half];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) tile.start[n][2 * half] = tile.start[n][2 * half + 1] = neg_delta;
    totals.dout_squared = fmaxf(totals.dout_squared, squared);
    totals.delta = fmaxf(totals.delta, fabsf(neg_delta));
    if (t == 0 && half < rows_left && x < f.width) core::store_global<float>(args.neg_delta + at, neg_delta);
  }
}

// What one row of keys adds to dq. seen: [8 keys][query row].
template <int dim, class T, bool cosine>
DEVICE void add_row_of_keys(float (&dq)[dim / 8][4], const QueryTile<dim>& tile, uint32_t keys, uint32_t values,
                            const Sixteen<dim>& places, const uint32_t (&seen)[2][2], float slope) {
  using Unit = Held<T, cosine>;
  float s[2][4], d[2][4];
  times_prepared<dim, Unit>(s, tile.q, keys + places.prepared_at);
  times_raw<dim, T>(d, tile.start, tile.dout, values + places.raw_at);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) d[n][e] *= core::exp2(fmaf(s[n][e], slope, tile.level[e / 2]));
  uint32_t ds[4];
  pack_seen<Unit>(ds, d, seen);
  add_weighted<dim, Unit>(dq, ds, keys + places.transposed_at);
}

template <int dim, class T, bool cosine>
DEVICE void store_queries(const float (&dq)[dim / 8][4], const QueryTile<dim>& tile, Totals& totals,
                          const BackwardArgs& args, const Place& place, const Stream<dim>& stream, int y, int x,
                          int rows_left, int table_column, float factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool mine = half < rows_left && x < args.forward.width;
    const float unscale = core::exp2(-tile.exponent[half]);
    Quarter<dim> result;
    const float part = gradient_of_token<dim, T, cosine>(result, dq, tile.q, half, tile.inverse_length[half],
                                                         factor * unscale, stream.angles_at(y + half, table_column, t));
    totals.dcosine_scale += mine ? part * unscale : 0.0f;
    if (mine && args.dq.data != nullptr)
      store_quarter<dim>(token_at(args.dq, image_of(args.dq, place), y + half, x), t, result);
  }
}

// The block's totals, as one part for keys_kernel and sum_kernel.
DEVICE void store_part(const Totals& totals, Part* part, uint32_t sums) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float own[3] = {sum_of_warp(totals.dcosine_scale), max_of_warp(totals.dout_squared), max_of_warp(totals.delta)};
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < 3; ++i) core::store_shared<float>(sums + warp * 16 + 4 * i, own[i]);
  core::sync_block();
  if (threadIdx.x != 0) return;
  Part result = {};
  for (int w = 0; w < warps; ++w) {
    result.dcosine_scale += core::load_shared<float>(sums + w * 16);
    result.dout_squared = fmaxf(result.dout_squared, core::load_shared<float>(sums + w * 16 + 4));
    result.delta = fmaxf(result.delta, core::load_shared<float>(sums + w * 16 + 8));
  }
  core::store_global<Part>(part, result);
}

template <int dim, class T, bool cosine>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocksPerProcessor) queries_kernel(const BackwardArgs args) {
  const Args& f = args.forward;
  const uint32_t shared = core::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = core::uniform(thread / 32), warps = blockDim.x / 32;
  const Place place = place_of(blockIdx.x, f);
  const int x0 = place.strip * kTileColumns * warps, y_begin = place.segment * f.rows;
  const int rows = least(f.height - y_begin, f.rows), live = f.window_rows + kStep - 1;
  const int x = x0 + kTileColumns * warp + lane / 4, table_column = kTileColumns * warp + f.window_columns / 2 + lane / 4;
  const bool active = x0 + kTileColumns * warp < f.width;
  const float factor = factor_of(f, place.head), slope = factor * kLog2E;
  // With neither dq nor the gradient of cosine_scale, only notes of the queries are wanted.
  const bool whole = args.dq.data != nullptr || args.dcosine_scale != nullptr;

  Stream<dim> stream;
  set_up(stream, args, shared);
  stream.x = f.k, stream.y = f.v, stream.x_image = image_of(f.k, place), stream.y_image = image_of(f.v, place);
  stream.first_row = y_begin - f.window_rows / 2, stream.first_column = x0 - f.window_columns / 2;
  store_angles<dim>(f, place.head, stream.row_table, stream.first_row, rows + kStep + live, stream.column_table,
                    stream.first_column, stream.columns, thread, blockDim.x);
  core::sync_block();
  const auto nothing_more = [](auto...) {};
  if (whole) {
    stream.load(stream.first_row, live, 0, nothing_more);
    core::copy_async_commit();
    core::copy_async_wait<0>();
    stream.template prepare<T, cosine>(stream.first_row, live, 0, nothing_more);
  }

  const Sixteen<dim> places(kTileColumns * warp, lane);
  uint32_t in_window[2];  // bits of a pair of keys 8n + 2t, 8n + 2t + 1 by query g
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int key = 8 * n + 2 * (lane % 4) - lane / 4;
    in_window[n] = (key >= 0 && key < f.window_columns ? 0xffffu : 0u) |
                   (key + 1 >= 0 && key + 1 < f.window_columns ? 0xffff0000u : 0u);
  }
  Totals totals = {};
  int first_slot = 0;  // of the first row that the tiles see
#pragma unroll 1
  for (int done = 0; done < rows; done += kStep) {
    const int y = y_begin + done, coming = stream.first_row + done + live;
    const int coming_slot = first_slot + live >= stream.ring ? first_slot + live - stream.ring : first_slot + live;
    const bool more = whole && done + kStep < rows;
    core::sync_block();
    if (more) stream.load(coming, kStep, coming_slot, nothing_more);
    core::copy_async_commit();
    if (active) {
      QueryTile<dim> tile;
      load_queries<dim, T, cosine>(tile, totals, args, place, stream, y, x, rows - done, table_column);
      float dq[dim / 8][4] = {};
      int slot = first_slot;
#pragma unroll 1
      for (int r = 0; r < live && whole; ++r) {
        const uint32_t row = slot * stream.row_bytes();
        const uint32_t above = r < f.window_rows ? ~0u : 0u, below = r > 0 ? ~0u : 0u;
        const uint32_t seen[2][2] = {{in_window[0] & above, in_window[0] & below},
                                     {in_window[1] & above, in_window[1] & below}};
        add_row_of_keys<dim, T, cosine>(dq, tile, stream.x_ring + row, stream.y_ring + row, places, seen, slope);
        if (++slot == stream.ring) slot = 0;
      }
      if (whole)
        store_queries<dim, T, cosine>(dq, tile, totals, args, place, stream, y, x, rows - done, table_column, factor);
    }
    core::copy_async_wait<0>();
    if (more) stream.template prepare<T, cosine>(coming, kStep, coming_slot, nothing_more);
    first_slot = first_slot + kStep >= stream.ring ? first_slot + kStep - stream.ring : first_slot + kStep;
  }
  const int64_t parts = (int64_t(place.image) * f.heads + place.head) * args.parts_per_head;
  store_part(totals, args.parts + parts + place.segment * f.strips + place.strip, shared + args.layout.sums);
}

// ---- 2: over keys ----------------------------------------------------------------------------------------------------
constexpr float kTopOfKeys = 15.0f;

// 2 × 8 keys; token g of rows y and y + 1.
template <int dim>
struct KeyTile {
  Fragments<dim> k, v;
  float inverse_length[2], scale[2], unscale[2];  // scale: a power of two that keeps ds in float16's range
};

// A strip's own keys: columns begin … end − 1. The last strip may begin before the one before it is full.
struct KeyStrip {
  int begin, end;
};

// The first query that sees a key, away from borders, lies so many columns before it.
BOTH int keys_reach_back(int window) { return window - 1 - window / 2; }

BOTH KeyStrip key_strip(int strip, int strips, int columns, int first_strip, int last_strip, int width) {
  const auto begin = [&](int i) { return i == strips - 1 ? last_strip : first_strip + i * columns; };
  return {begin(strip), strip == strips - 1 ? width : begin(strip + 1)};
}

// The largest length of dout and magnitude of delta in the image, of this head.
DEVICE Totals totals_of_head(const BackwardArgs& args, const Place& place, uint32_t sums) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Part* parts = args.parts + (int64_t(place.image) * args.forward.heads + place.head) * args.parts_per_head;
  Totals totals = {};
  for (int i = threadIdx.x; i < args.parts_per_head; i += blockDim.x) {
    const Part part = core::load_global<Part>(parts + i);
    totals.dout_squared = fmaxf(totals.dout_squared, part.dout_squared);
    totals.delta = fmaxf(totals.delta, part.delta);
  }
  const float own[2] = {max_of_warp(totals.dout_squared), max_of_warp(totals.delta)};
  if (threadIdx.x % 32 == 0) core::store_shared<float2>(sums + warp * 8, float2{own[0], own[1]});
  core::sync_block();
  for (int w = 0; w < warps; ++w) {
    const float2 both = core::load_shared<float2>(sums + w * 8);
    totals.dout_squared = fmaxf(totals.dout_squared, both.x);
    totals.delta = fmaxf(totals.delta, both.y);
  }
  return totals;
}

template <int dim, class T, bool cosine>
DEVICE void load_keys(KeyTile<dim>& tile, const BackwardArgs& args, const Place& place, const Stream<dim>& stream,
                      const Totals& totals, const int (&y)[2], int x) {
  const Args& f = args.forward;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Quarter<dim> raw = load_quarter<dim>(token_at(f.k, image_of(f.k, place), y[half], x), t);
    const Quarter<dim> value = load_raw<dim>(token_at(f.v, image_of(f.v, place), y[half], x), t, args.nothing);
    put<dim>(tile.k, half,
             prepared<dim, T, cosine>(
                 raw, load_angles<dim>(stream.angles_at(y[half], x - stream.first_column, t)), 1.0f,
                 tile.inverse_length[half]));
    put<dim>(tile.v, half, value);
    tile.scale[half] = tile.unscale[half] = 1;
    if constexpr (std::is_same_v<Held<T, cosine>, Float16>) {
      float squared = 0;
#pragma unroll
      for (int c = 0; c < dim / 8; ++c) squared = dot_of_words<T>(value.word[c], value.word[c], squared);
      const float most_change = sqrtf(sum_of_token(squared) * totals.dout_squared) + totals.delta;
      const float exponent = exponent_for(core::log2(most_change), kTopOfKeys);
      tile.scale[half] = core::exp2(exponent), tile.unscale[half] = core::exp2(-exponent);
    }
  }
}

// What one row of queries adds to dk and dv. scalars: their levels, and `delta_ring` bytes later −delta, of the first of 16.
template <int dim, class T, bool cosine>
DEVICE void add_row_of_queries(float (&dk)[dim / 8][4], float (&dv)[dim / 8][4], const KeyTile<dim>& tile, uint32_t queries,
                               uint32_t douts, uint32_t scalars, uint32_t delta_ring, const Sixteen<dim>& places,
                               const uint32_t (&seen)[2][2], float slope) {
  using Unit = Held<T, cosine>;
  float p[2][4], d[2][4], start[2][4], level[2][2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t at = scalars + 32 * n + threadIdx.x % 4 * 8;
    const float2 levels = core::load_shared<float2>(at), deltas = core::load_shared<float2>(at + delta_ring);
    level[n][0] = levels.x, level[n][1] = levels.y;
    start[n][0] = start[n][2] = deltas.x, start[n][1] = start[n][3] = deltas.y;
  }
  times_prepared<dim, Unit>(p, tile.k, queries + places.prepared_at);
  times_raw<dim, T>(d, start, tile.v, douts + places.raw_at);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      p[n][e] = core::exp2(fmaf(p[n][e], slope, level[n][e % 2]));
      d[n][e] *= p[n][e];
      if constexpr (std::is_same_v<Unit, Float16>) d[n][e] *= tile.scale[e / 2];
    }
  uint32_t weights[4], ds[4];
  pack_seen<T>(weights, p, seen);
  pack_seen<Unit>(ds, d, seen);
  add_weighted<dim, T>(dv, weights, douts + places.transposed_at);
  add_weighted<dim, Unit>(dk, ds, queries + places.transposed_at);
}

// Accumulators hold features 2t, 2t + 1 of every chunk of 8. Neighbours exchange, so that a lane has 4 features together.
template <int dim, class T>
DEVICE void store_sums(char* token, const float (&sums)[dim / 8][4], int half, bool mine) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2;
  uint32_t word[dim / 8];
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) word[c] = pack<T>(sums[c][2 * half], sums[c][2 * half + 1]);
#pragma unroll
  for (int c = 0; c < dim / 8; c += 2) {
    const uint32_t got = core::shuffle_xor(odd ? word[c] : word[c + 1], 1);
    (odd ? word[c] : word[c + 1]) = got;
    if (mine) core::store_global<uint2>(token + 16 * (c + t % 2) + 8 * (t / 2), uint2{word[c], word[c + 1]});
  }
}

template <int dim, class T, bool cosine>
DEVICE void store_keys(const float (&dk)[dim / 8][4], const float (&dv)[dim / 8][4], const KeyTile<dim>& tile,
                       const BackwardArgs& args, const Place& place, const Stream<dim>& stream, const int (&y)[2], int x,
                       const bool (&mine)[2], float factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Quarter<dim> result;
    gradient_of_token<dim, T, cosine>(result, dk, tile.k, half, tile.inverse_length[half], factor * tile.unscale[half],
                                      stream.angles_at(y[half], x - stream.first_column, t));
    if (mine[half] && args.dk.data != nullptr)
      store_quarter<dim>(token_at(args.dk, image_of(args.dk, place), y[half], x), t, result);
    store_sums<dim, T>(token_at(args.dv, image_of(args.dv, place), y[half], x), dv, half,
                       mine[half] && args.dv.data != nullptr);
  }
}

template <int dim, class T, bool cosine>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocksPerProcessor) keys_kernel(const BackwardArgs args) {
  const Args& f = args.forward;
  const uint32_t shared = core::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = core::uniform(thread / 32), warps = blockDim.x / 32;
  const Place place = place_of(blockIdx.x, f);
  const KeyStrip strip = key_strip(place.strip, f.strips, kTileColumns * warps, args.first_strip, args.last_strip, f.width);
  const int y_begin = place.segment * f.rows, y_end = least(f.height, y_begin + f.rows);
  const float factor = factor_of(f, place.head), slope = factor * kLog2E;

  Stream<dim> stream;
  set_up(stream, args, shared);
  stream.x = f.q, stream.y = args.dout, stream.x_image = image_of(f.q, place), stream.y_image = image_of(args.dout, place);
  stream.first_row = first_query(y_begin, f.window_rows);
  stream.first_column = strip.begin - keys_reach_back(f.window_columns);
  const int table_rows = last_query(y_end - 1, f.height, f.window_rows) + 1 - stream.first_row;
  store_angles<dim>(f, place.head, stream.row_table, stream.first_row, table_rows, stream.column_table,
                    stream.first_column, stream.columns, thread, blockDim.x);
  const Totals totals = totals_of_head(args, place, shared + args.layout.sums);
  core::sync_block();

  // Levels and −delta of the queries lie in rings of their own.
  const uint32_t levels = shared + args.layout.scalars, delta_ring = stream.ring * stream.columns * 4;
  const auto load_scalars = [&](int row, int column, int at) {
    const int64_t query = scalar_at(f, place, row, column);
    if (thread % 4 == 1) core::copy_async_4(levels + 4 * at, f.lse + query);
    if (thread % 4 == 2) core::copy_async_4(levels + delta_ring + 4 * at, args.neg_delta + query);
  };
  const auto scale_level = [&](int at) {
    if (thread % 4 == 1)
      core::store_shared<float>(levels + 4 * at, core::load_shared<float>(levels + 4 * at) * -kLog2E);
  };

  const int tile_begin = strip.begin + kTileColumns * warp, x = tile_begin + lane / 4;
  const int safe_x = most(0, least(x, f.width - 1));
  const bool active = tile_begin < strip.end && tile_begin + kTileColumns > 0;
  const int window = kTileColumns * warp;  // ring column of the first of the 16 queries that may see a key of the tile
  const Sixteen<dim> places(window, lane);
  uint32_t in_window[2] = {0, 0};  // bits of a pair of queries 8n + 2t, 8n + 2t + 1 by key g
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int query = stream.first_column + window + 8 * n + 2 * (lane % 4) + e;
      if (x >= 0 && x < strip.end && query >= first_query(x, f.window_columns) &&
          query <= last_query(x, f.width, f.window_columns))
        in_window[n] |= e ? 0xffff0000u : 0xffffu;
    }

  int have = stream.first_row, have_slot = 0, low_slot = 0, low_before = have;  // rows below `have` are in the ring or past
  const auto advance = [&](int rows) {
    have += rows, have_slot += rows;
    if (have_slot >= stream.ring) have_slot -= stream.ring;
  };
#pragma unroll 1
  for (int row = y_begin; row < y_end; row += kStep) {
    const int y[2] = {row, least(row + 1, f.height - 1)};
    const int low = first_query(y[0], f.window_rows), high = last_query(y[1], f.height, f.window_rows);
    low_slot += low - low_before;
    if (low_slot >= stream.ring) low_slot -= stream.ring;
    low_before = low;
    core::sync_block();
    if (have <= high) {  // at the start and at borders
      const int rows = high + 1 - have;
      stream.load(have, rows, have_slot, load_scalars);
      core::copy_async_commit();
      core::copy_async_wait<0>();
      stream.template prepare<T, cosine>(have, rows, have_slot, scale_level);
      advance(rows);
      core::sync_block();
    }
    int coming = 0;  // rows for the next tiles, if there is room for them
    if (row + kStep < y_end) {
      const int next = last_query(least(row + kStep + 1, f.height - 1), f.height, f.window_rows);
      coming = most(0, least(next, low + stream.ring - 1) + 1 - have);
    }
    stream.load(have, coming, have_slot, load_scalars);
    core::copy_async_commit();
    if (active) {
      KeyTile<dim> tile;
      load_keys<dim, T, cosine>(tile, args, place, stream, totals, y, safe_x);
      float dk[dim / 8][4] = {}, dv[dim / 8][4] = {};
      const int last_of_first = last_query(y[0], f.height, f.window_rows), first_of_last = first_query(y[1], f.window_rows);
      int slot = low_slot;
#pragma unroll 1
      for (int r = low; r <= high; ++r) {
        const uint32_t at = slot * stream.row_bytes(), scalars = levels + (slot * stream.columns + window) * 4;
        const uint32_t above = r <= last_of_first ? ~0u : 0u, below = r >= first_of_last ? ~0u : 0u;
        const uint32_t seen[2][2] = {{in_window[0] & above, in_window[0] & below},
                                     {in_window[1] & above, in_window[1] & below}};
        add_row_of_queries<dim, T, cosine>(dk, dv, tile, stream.x_ring + at, stream.y_ring + at, scalars, delta_ring,
                                           places, seen, slope);
        if (++slot == stream.ring) slot = 0;
      }
      const bool inside = x >= 0 && x < strip.end, mine[2] = {inside, inside && row + 1 < y_end};
      store_keys<dim, T, cosine>(dk, dv, tile, args, place, stream, y, safe_x, mine, factor);
    }
    core::copy_async_wait<0>();
    stream.template prepare<T, cosine>(have, coming, have_slot, scale_level);
    advance(coming);
  }
}

// ---- 3: the gradient of cosine_scale -----------------------------------------------------------------------------------
// One warp for each head of each image.
__global__ void __launch_bounds__(32) sum_kernel(const BackwardArgs args) {
  const Part* parts = args.parts + int64_t(blockIdx.x) * args.parts_per_head;
  float sum = 0;
  for (int i = threadIdx.x; i < args.parts_per_head; i += 32) sum += core::load_global<Part>(parts + i).dcosine_scale;
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) core::store_global<float>(args.dcosine_scale + blockIdx.x, sum * args.forward.scale);
}

// ---- host side -------------------------------------------------------------------------------------------------------
uint32_t round_up(int64_t value, int64_t to) { return uint32_t((value + to - 1) / to * to); }

Layout layout_of(int dim, int warps, int ring, int table_rows, bool scalars) {
  Layout layout = {};
  layout.columns = kTileColumns * (warps + 1);  // a tile's 8 columns see, or are seen by, at most 16
  layout.ring = ring;
  layout.y_ring = uint32_t(ring * layout.columns * 2 * dim);
  layout.scalars = 2 * layout.y_ring;
  layout.column_table = layout.scalars + (scalars ? round_up(ring * layout.columns * 8, 128) : 0);
  layout.row_table = layout.column_table + layout.columns * (dim / 2);
  layout.sums = layout.row_table + table_rows * (dim / 2);
  layout.bytes = layout.sums + warps * 16;
  return layout;
}

// The rows of a segment: blocks run at most `slots` at a time, and each also loads the rows around its own.
int rows_of_segment(int height, int window, int64_t blocks_per_segment) {
  const int64_t slots = kBlocksPerProcessor * kProcessors;
  int best = 0;
  int64_t best_cost = 0;
  for (int segments = 1; segments <= (height + kStep - 1) / kStep; ++segments) {
    const int rows = int(round_up(ceil_div(height, segments), kStep));
    const int64_t cost = ceil_div(ceil_div(height, rows) * blocks_per_segment, slots) * (rows + window);
    if (best == 0 || cost < best_cost) best = rows, best_cost = cost;
  }
  return best;
}

// Whether the queries that see keys begin … end − 1 of a tile lie within the 16 columns that the tile is multiplied with.
bool tile_fits(int begin, int end, int width, int window) {
  const int first = begin - keys_reach_back(window), low = begin > 0 ? begin : 0;
  const int high = (end < begin + kTileColumns ? end : begin + kTileColumns) - 1;
  if (low > high) return true;
  return first_query(low, window) >= first && last_query(high, width, window) < first + 16;
}

bool strips_fit(int strips, int columns, int first_strip, int last_strip, int width, int window) {
  for (int i = 0; i < strips; ++i) {
    const KeyStrip strip = key_strip(i, strips, columns, first_strip, last_strip, width);
    for (int begin = strip.begin; begin < strip.end; begin += kTileColumns)
      if (!tile_fits(begin, strip.end, width, window)) return false;
  }
  return true;
}

// Cuts the columns into strips of keys, none of whose tiles is seen by queries of more than 16 columns. A tile of which only
// some keys lie at a border may be; then strips begin before the image, or the last one before it has to.
void cut_columns_of_keys(BackwardArgs& args, int columns) {
  const int width = args.forward.width, window = args.forward.window_columns;
  for (int extra = 0;; ++extra)
    for (int before = 0; before < kTileColumns; ++before) {
      const int strips = (width + before + columns - 1) / columns + extra, nominal = -before + (strips - 1) * columns;
      for (int shift = 0; shift < (strips == 1 ? 1 : columns); ++shift) {
        if (nominal - shift >= width || !strips_fit(strips, columns, -before, nominal - shift, width, window)) continue;
        args.forward.strips = strips, args.first_strip = -before, args.last_strip = nominal - shift;
        return;
      }
    }
}

// Shared memory that a block of the current device may have.
int64_t most_shared_bytes() {
#if defined(HDIT_EMULATION)
  return 227 << 10;
#else
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
#endif
}

struct Plan {
  BackwardArgs args;
  int warps;
};

int64_t images(const NeighborhoodAttentionBackward& a) { return a.forward.batch * a.forward.heads; }

BackwardArgs args_of(const NeighborhoodAttentionBackward& a) {
  BackwardArgs args = {};
  args.forward = strips::args_of(a.forward, kTileColumns, kStep);  // its strips and segments are set later
  const auto tensor = [](const Tokens& x) { return x.data == nullptr ? Tensor{} : in_bytes(x); };
  const int64_t token = a.forward.heads * a.forward.dim, width = a.forward.columns.length;
  args.out = in_bytes({a.forward.out, a.forward.rows.length * width * token, width * token, token, a.forward.dim});
  args.dout = tensor(a.dout), args.dq = tensor(a.dq), args.dk = tensor(a.dk), args.dv = tensor(a.dv);
  args.dlse = static_cast<const float*>(a.dlse);
  args.dcosine_scale = static_cast<float*>(a.dcosine_scale);
  return args;
}

// As many warps in a block as shared memory allows; none if not even one.
Plan plan_queries(BackwardArgs args, const NeighborhoodAttentionBackward& a, int64_t most_bytes) {
  Args& f = args.forward;
  int warps = kMostWarps;
  for (; warps > 0; --warps) {
    const int columns = kTileColumns * warps, ring = f.window_rows + 2 * kStep - 1;
    f.strips = (f.width + columns - 1) / columns;
    f.rows = rows_of_segment(f.height, f.window_rows, f.strips * images(a));
    f.segments = (f.height + f.rows - 1) / f.rows;
    args.layout = layout_of(int(a.forward.dim), warps, ring, f.rows + f.window_rows + 2 * kStep, false);
    if (args.layout.bytes <= most_bytes) break;
  }
  args.parts_per_head = f.strips * f.segments;
  return {args, warps};
}

Plan plan_keys(BackwardArgs args, const NeighborhoodAttentionBackward& a, int64_t most_bytes) {
  Args& f = args.forward;
  // The most rows of queries that two rows of keys are seen by, and if possible the two that come next.
  int ring = f.window_rows + 2 * kStep - 1;
  for (int y = 0; y < f.height; y += kStep)
    ring = most(ring, last_query(least(y + 1, f.height - 1), f.height, f.window_rows) + 1 - first_query(y, f.window_rows));
  int warps = kMostWarps;
  for (; warps > 0; --warps) {
    cut_columns_of_keys(args, kTileColumns * warps);
    f.rows = rows_of_segment(f.height, f.window_rows, f.strips * images(a));
    f.segments = (f.height + f.rows - 1) / f.rows;
    args.layout = layout_of(int(a.forward.dim), warps, ring, f.rows + 2 * f.window_rows, true);
    if (args.layout.bytes <= most_bytes) break;
  }
  return {args, warps};
}

bool takes(const NeighborhoodAttentionBackward& a) {
  const NeighborhoodAttention& f = a.forward;
  const auto fits = [&](const Tokens& x) { return x.data == nullptr || strips::takes(x, f); };
  return strips::takes(f) && (f.dim == 64 || f.dim == 32) && a.dout.data != nullptr && fits(a.dout) && fits(a.dq) &&
         fits(a.dk) && fits(a.dv) && aligned(f.out);
}

// launch(dim, element, cosine) of a call's kernels, as types.
template <class Launch>
void with_kernel(const NeighborhoodAttention& f, Launch launch) {
  const auto with_dim = [&](auto element, auto cosine) {
    if (f.dim == 64) launch(std::integral_constant<int, 64>(), element, cosine);
    else launch(std::integral_constant<int, 32>(), element, cosine);
  };
  const auto with_element = [&](auto cosine) {
    if (f.dtype == DType::bfloat16) with_dim(BFloat16(), cosine);
    else with_dim(Float16(), cosine);
  };
  if (f.cosine_scale != nullptr) with_element(std::true_type());
  else with_element(std::false_type());
}

std::string shape_of(const NeighborhoodAttention& f) {
  std::string text = "neighborhood_attention_backward of q (";
  for (const int64_t size : {f.batch, f.rows.length, f.columns.length, f.heads, f.dim})
    text += (text.back() == '(' ? "" : ", ") + std::to_string(size);
  return text + ")";
}

}  // namespace

int64_t neighborhood_attention_strips_workspace_cuda(const NeighborhoodAttentionBackward& a) {
  if (!takes(a)) return 0;
  const int64_t height = a.forward.rows.length, width = a.forward.columns.length;
  const int64_t most_parts = images(a) * ceil_div(height, kStep) * ceil_div(width, kTileColumns);
  return most_parts * int64_t(sizeof(Part)) + images(a) * height * width * int64_t(sizeof(float));
}

bool neighborhood_attention_strips_backward_cuda(const NeighborhoodAttentionBackward& a, void* workspace, void* stream) {
  if (!takes(a)) return false;
  if (images(a) == 0) return true;
  const int64_t most_bytes = most_shared_bytes();
  const BackwardArgs args = args_of(a);
  Plan queries = plan_queries(args, a, most_bytes), keys = plan_keys(args, a, most_bytes);
  if (queries.warps == 0 || keys.warps == 0) return false;
  queries.args.parts = reinterpret_cast<Part*>(static_cast<char*>(workspace));
  queries.args.neg_delta = reinterpret_cast<float*>(queries.args.parts + images(a) * queries.args.parts_per_head);
  keys.args.parts = queries.args.parts, keys.args.neg_delta = queries.args.neg_delta;
  keys.args.parts_per_head = queries.args.parts_per_head;
  const std::string call = shape_of(a.forward);
  const auto launch = [&](const char* name, auto kernel, const Plan& plan) {
    const int64_t blocks = images(a) * plan.args.forward.strips * plan.args.forward.segments;
    core::launch(call + ", " + name, kernel, dim3(unsigned(blocks)), dim3(32 * plan.warps), plan.args.layout.bytes, stream,
                 plan.args);
  };
  with_kernel(a.forward, [&](auto dim, auto element, auto cosine) {
    using T = decltype(element);
    launch("queries", queries_kernel<decltype(dim)::value, T, decltype(cosine)::value>, queries);
    if (a.dk.data != nullptr || a.dv.data != nullptr)
      launch("keys", keys_kernel<decltype(dim)::value, T, decltype(cosine)::value>, keys);
  });
  if (a.dcosine_scale != nullptr)
    core::launch(call + ", sum", sum_kernel, dim3(unsigned(images(a))), dim3(32), 0, stream, queries.args);
  return true;
}

}  // namespace hdit
