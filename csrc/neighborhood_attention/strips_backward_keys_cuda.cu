// dk and dv, over keys: the second kernel of the fast path's backward pass (strips_backward_cuda.cu: the whole).
//
// A warp owns tiles of 2 × 8 keys and marches down a strip. The queries that see them lie in a contiguous range of
// rows, more than the window at a border, so that nothing has to be added back, and in at most 16 columns, as the host
// cuts the strips. Rows of prepared queries and of dout stream through rings.
#include "strips_backward.cuh"

namespace hdit {
namespace {

using namespace strips;

// Powers of two that keep ds in float16's range, for each row of a tile.
struct Scales {
  float scale[2], unscale[2];
};

// The largest elements of dout and delta in the image, of this head.
DEVICE Totals totals_of_head(const BackwardArgs& args, const Place& place, uint32_t sums) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const Part* parts = args.parts + (int64_t(place.image) * args.forward.heads + place.head) * args.parts_per_head;
  Totals totals = {};
  for (int i = threadIdx.x; i < args.parts_per_head; i += blockDim.x) {
    const Part part = core::load_global<Part>(parts + i);
    totals.dout = fmaxf(totals.dout, part.dout);
    totals.delta = fmaxf(totals.delta, part.delta);
  }
  const float own[2] = {max_of_warp(totals.dout), max_of_warp(totals.delta)};
  if (threadIdx.x % 32 == 0) core::store_shared<float2>(sums + warp * 8, float2{own[0], own[1]});
  core::sync_block();
  for (int w = 0; w < warps; ++w) {
    const float2 both = core::load_shared<float2>(sums + w * 8);
    totals.dout = fmaxf(totals.dout, both.x);
    totals.delta = fmaxf(totals.delta, both.y);
  }
  return totals;
}

template <int dim, class T, bool cosine>
DEVICE Scales scales_of(const RawKeys<dim>& raw, const Totals& totals) {
  Scales scales = {{1, 1}, {1, 1}};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if constexpr (std::is_same_v<Held<T, cosine>, Float16>) {
      const float largest = max_of_token(largest_of<dim, T>(raw.v[half]));
      const float exponent = exponent_of_ds<dim>(totals.dout, largest, totals.delta);
      scales.scale[half] = core::exp2(exponent), scales.unscale[half] = core::exp2(-exponent);
    }
  return scales;
}

// What one row of queries adds to dk and dv. scalars: their levels, and `delta_ring` bytes later −delta, of the first
// of 16.
template <int dim, class T, bool cosine, Sums sums>
DEVICE void add_row_of_queries(float (&dk)[dim / 8][4], float (&dv)[dim / 8][4], const KeyTile<dim>& tile,
                               const Scales& scales, uint32_t queries, uint32_t douts, uint32_t scalars,
                               uint32_t delta_ring, const Sixteen<dim>& places, const uint32_t (&seen)[2][2],
                               float slope) {
  using Unit = Held<T, cosine>;
  const uint32_t at = scalars + threadIdx.x % 4 * 8;
  float p[2][4];
  times_prepared<dim, Unit>(p, tile.k, queries, places);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 level = core::load_shared<float2>(at + 32 * n);
#pragma unroll
    for (int e = 0; e < 4; ++e) p[n][e] = core::exp2(fmaf(p[n][e], slope, e % 2 ? level.y : level.x));
  }
  if constexpr (sums != Sums::keys) {
    uint32_t weights[4];
    pack_seen<T>(weights, p, seen);
    add_weighted<dim, T>(dv, weights, douts, places);
  }
  if constexpr (sums != Sums::values) {
    float d[2][4], start[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 delta = core::load_shared<float2>(at + 32 * n + delta_ring);
      start[n][0] = start[n][2] = delta.x, start[n][1] = start[n][3] = delta.y;
    }
    times_raw<dim, T>(d, start, tile.v, douts, places);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        d[n][e] *= p[n][e];
        if constexpr (std::is_same_v<Unit, Float16>) d[n][e] *= scales.scale[e / 2];
      }
    uint32_t ds[4];
    pack_seen<Unit>(ds, d, seen);
    add_weighted<dim, Unit>(dk, ds, queries, places);
  }
}

template <int dim, class T, bool cosine>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocksPerProcessor) keys_kernel(const BackwardArgs args) {
  const Args& f = args.forward;
  const uint32_t shared = core::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = core::uniform(thread / 32), warps = blockDim.x / 32;
  const Place place = place_of(blockIdx.x, f);
  const KeyStrip strip =
      key_strip(place.strip, f.strips, kTileColumns * warps, args.first_strip, args.last_strip, f.width);
  const int y_begin = args.first_row + place.segment * f.rows, y_end = least(f.height, y_begin + f.rows);
  const float factor = factor_of(f, place.head), slope = factor * kLog2E;

  Stream<dim> stream;
  set_up(stream, args, shared);
  stream.x = f.q, stream.y = args.dout;
  stream.x_image = image_of(f.q, place), stream.y_image = image_of(args.dout, place);
  stream.first_row = first_query(most(0, y_begin), f.window_rows);
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
  const auto scale_level = [&](int at, auto...) {
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

  int have = stream.first_row, have_slot = 0;  // rows below `have` are in the ring or past
  int low_slot = 0, low_before = have;
  const auto advance = [&](int rows) {
    have += rows, have_slot += rows;
    if (have_slot >= stream.ring) have_slot -= stream.ring;
  };
#pragma unroll 1
  for (int row = y_begin; row < y_end; row += kStep) {
    const int y[2] = {most(row, 0), least(row + 1, f.height - 1)};
    const int low = first_query(y[0], f.window_rows), high = last_query(y[1], f.height, f.window_rows);
    low_slot += low - low_before;
    if (low_slot >= stream.ring) low_slot -= stream.ring;
    low_before = low;
    core::sync_block();
    if (have <= high) {  // at the start and at borders
      const int rows = high + 1 - have;
      stream.template load<false>(have, rows, have_slot, load_scalars);
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
    stream.template load<false>(have, coming, have_slot, load_scalars);
    core::copy_async_commit();
    if (active) {
      const RawKeys<dim> raw = load_keys<dim>(args, image_of(f.k, place), image_of(f.v, place), y, safe_x);
      const Scales scales = scales_of<dim, T, cosine>(raw, totals);
      KeyTile<dim> tile;
      prepare_keys<dim, T, cosine>(tile, raw, stream, y, safe_x);
      const int last_of_first = last_query(y[0], f.height, f.window_rows);
      const int first_of_last = first_query(y[1], f.window_rows);
      const bool inside = x >= 0 && x < strip.end, mine[2] = {inside && row >= 0, inside && row + 1 < y_end};
      const auto add_up = [&](auto which) {
        constexpr Sums sums = decltype(which)::value;
        float dk[dim / 8][4] = {}, dv[dim / 8][4] = {};
        int slot = low_slot;
#pragma unroll 1
        for (int r = low; r <= high; ++r) {
          const uint32_t at = slot * stream.row_bytes(), scalars = levels + (slot * stream.columns + window) * 4;
          const uint32_t above = r <= last_of_first ? ~0u : 0u, below = r >= first_of_last ? ~0u : 0u;
          const uint32_t seen[2][2] = {{in_window[0] & above, in_window[0] & below},
                                       {in_window[1] & above, in_window[1] & below}};
          add_row_of_queries<dim, T, cosine, sums>(dk, dv, tile, scales, stream.x_ring + at, stream.y_ring + at,
                                                   scalars, delta_ring, places, seen, slope);
          if (++slot == stream.ring) slot = 0;
        }
        const float factors[2] = {factor * scales.unscale[0], factor * scales.unscale[1]};
        store_keys<dim, T, cosine, sums>(dk, dv, tile, args, image_of(args.dk, place), image_of(args.dv, place),
                                         stream, y, safe_x, mine, factors, 1.0f);
      };
      if constexpr (dim < 128) {
        add_up(std::integral_constant<Sums, Sums::both>());
      } else {
        if (args.dv.data != nullptr) add_up(std::integral_constant<Sums, Sums::values>());
        if (args.dk.data != nullptr) add_up(std::integral_constant<Sums, Sums::keys>());
      }
    }
    core::copy_async_wait<0>();
    stream.template prepare<T, cosine>(have, coming, have_slot, scale_level);
    advance(coming);
  }
}

}  // namespace

void strips::launch_keys(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call,
                         void* stream) {
  with_kernel_types(a, [&](auto dim, auto element, auto cosine) {
    constexpr auto kernel = keys_kernel<decltype(dim)::value, decltype(element), decltype(cosine)::value>;
    launch_blocks(call + ", keys", kernel, args, a.batch, stream);
  });
}

}  // namespace hdit
