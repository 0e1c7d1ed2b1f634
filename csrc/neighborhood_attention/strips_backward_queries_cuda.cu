// dq, over queries: the first kernel of the fast path's backward pass (strips_backward_cuda.cu: the whole).
//
// A warp owns tiles of 2 × 8 queries and marches down a strip. Their windows are window_rows + 1 rows of 16 keys; rows
// of prepared keys and of values stream through rings.
#include "strips_backward.cuh"

namespace hdit {
namespace {

using namespace strips;

// 2 × 8 queries; token g of rows y and y + 1.
template <int dim>
struct QueryTile {
  Fragments<dim> q, dout;
  float inverse_length[2], level[2], exponent[2];  // level: what factor·log2(e)·s takes on to be log2(p·2^exponent)
  float start[2][4];                               // −delta, where products with values begin
};

template <int dim, class T, bool cosine>
DEVICE void load_queries(QueryTile<dim>& tile, Totals& totals, const BackwardArgs& args, const Place& place,
                         const Stream<dim>& stream, int y, int x, int rows_left, int table_column,
                         float largest_value) {
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
    float delta = 0;
#pragma unroll
    for (int c = 0; c < dim / 8; ++c) delta = dot_of_words<T>(given.word[c], out.word[c], delta);
    const float dlse = args.dlse == nullptr ? 0.0f : core::load_global<float>(args.dlse + at);
    const float neg_delta = dlse - sum_of_token(delta);
    const float largest = max_of_token(largest_of<dim, T>(given));
    tile.level[half] = -kLog2E * core::load_global<float>(f.lse + at);
    tile.exponent[half] = 0;
    if constexpr (std::is_same_v<Held<T, cosine>, Float16>) {
      tile.exponent[half] = exponent_of_ds<dim>(largest, largest_value, fabsf(neg_delta));
      tile.level[half] += tile.exponent[half];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) tile.start[n][2 * half] = tile.start[n][2 * half + 1] = neg_delta;
    totals.dout = fmaxf(totals.dout, if_finite(largest));
    totals.delta = fmaxf(totals.delta, if_finite(fabsf(neg_delta)));
    if (t == 0 && half < rows_left && x < f.width) core::store_global<float>(args.neg_delta + at, neg_delta);
  }
}

// What one row of keys adds to dq. seen: [8 keys][query row].
template <int dim, class T, bool cosine>
DEVICE void add_row_of_keys(float (&dq)[dim / 8][4], const QueryTile<dim>& tile, uint32_t keys, uint32_t values,
                            const Sixteen<dim>& places, const uint32_t (&seen)[2][2], float slope) {
  using Unit = Held<T, cosine>;
  float s[2][4], d[2][4];
  times_prepared<dim, Unit>(s, tile.q, keys, places);
  times_raw<dim, T>(d, tile.start, tile.dout, values, places);
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) d[n][e] *= core::exp2(fmaf(s[n][e], slope, tile.level[e / 2]));
  uint32_t ds[4];
  pack_seen<Unit>(ds, d, seen);
  add_weighted<dim, Unit>(dq, ds, keys, places);
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
    const float part =
        gradient_of_token<dim, T, cosine>(result, dq, half, take<dim>(tile.q, half), tile.inverse_length[half],
                                          factor * unscale, stream.angles_at(y + half, table_column, t));
    totals.dcosine_scale += mine ? part * unscale : 0.0f;
    if (mine && args.dq.data != nullptr)
      store_quarter<dim>(token_at(args.dq, image_of(args.dq, place), y + half, x), t, result);
  }
}

// The block's totals, as one part for keys_kernel and sum_kernel.
DEVICE void store_part(const Totals& totals, Part* part, uint32_t sums) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  core::sync_block();  // `sums` has been in use
  const float own[3] = {sum_of_warp(totals.dcosine_scale), max_of_warp(totals.dout), max_of_warp(totals.delta)};
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < 3; ++i) core::store_shared<float>(sums + warp * 16 + 4 * i, own[i]);
  core::sync_block();
  if (threadIdx.x != 0) return;
  Part result = {};
  for (int w = 0; w < warps; ++w) {
    result.dcosine_scale += core::load_shared<float>(sums + w * 16);
    result.dout = fmaxf(result.dout, core::load_shared<float>(sums + w * 16 + 4));
    result.delta = fmaxf(result.delta, core::load_shared<float>(sums + w * 16 + 8));
  }
  core::store_global<Part>(part, result);
}

template <int dim, class T, bool cosine>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocksPerProcessor) queries_kernel(const BackwardArgs args) {
  constexpr bool kNarrow = std::is_same_v<Held<T, cosine>, Float16>;  // ds is rounded to float16
  const Args& f = args.forward;
  const uint32_t shared = core::dynamic_shared();
  const int thread = threadIdx.x, lane = thread % 32, warp = core::uniform(thread / 32), warps = blockDim.x / 32;
  const Place place = place_of(blockIdx.x, f);
  const int x0 = place.strip * kTileColumns * warps, y_begin = place.segment * f.rows;
  const int rows = least(f.height - y_begin, f.rows), live = f.window_rows + kStep - 1;
  const int x = x0 + kTileColumns * warp + lane / 4;
  const int table_column = kTileColumns * warp + f.window_columns / 2 + lane / 4;
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
  // The largest element of values in the ring so far: each warp's of what it copied, for the next step, in turns.
  const uint32_t largest_at = shared + args.layout.sums;
  float largest_value = 0;
  const auto find_largest = [&](int, uint32_t at, auto...) {
    if constexpr (kNarrow) largest_value = fmaxf(largest_value, if_finite(largest_of<dim, T>(stream.load_y(at))));
  };
  const auto share_largest = [&](int step) {
    if constexpr (kNarrow) {
      largest_value = max_of_warp(largest_value);
      if (lane == 0) core::store_shared<float>(largest_at + (step % 2 * kMostWarps + warp) * 4, largest_value);
    }
  };
  const auto take_largest = [&](int step) {
    if constexpr (kNarrow)
#pragma unroll 1
      for (int w = 0; w < warps; ++w)
        largest_value = fmaxf(largest_value, core::load_shared<float>(largest_at + (step % 2 * kMostWarps + w) * 4));
  };
  if (whole) {
    stream.template load<true>(stream.first_row, live, 0, nothing_more);
    core::copy_async_commit();
    core::copy_async_wait<0>();
    stream.template prepare<T, cosine>(stream.first_row, live, 0, find_largest);
    share_largest(0);
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
    if (whole) take_largest(done / kStep);
    if (more) stream.template load<true>(coming, kStep, coming_slot, nothing_more);
    core::copy_async_commit();
    if (active) {
      QueryTile<dim> tile;
      load_queries<dim, T, cosine>(tile, totals, args, place, stream, y, x, rows - done, table_column, largest_value);
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
    if (more) {
      stream.template prepare<T, cosine>(coming, kStep, coming_slot, find_largest);
      share_largest(done / kStep + 1);
    }
    first_slot = first_slot + kStep >= stream.ring ? first_slot + kStep - stream.ring : first_slot + kStep;
  }
  const int64_t parts = (int64_t(place.image) * f.heads + place.head) * args.parts_per_head;
  store_part(totals, args.parts + parts + place.segment * f.strips + place.strip, shared + args.layout.sums);
}

}  // namespace

void strips::launch_queries(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call,
                            void* stream) {
  with_kernel_types(a, [&](auto dim, auto element, auto cosine) {
    constexpr auto kernel = queries_kernel<decltype(dim)::value, decltype(element), decltype(cosine)::value>;
    launch_blocks(call + ", queries", kernel, args, a.batch, stream);
  });
}

}  // namespace hdit
