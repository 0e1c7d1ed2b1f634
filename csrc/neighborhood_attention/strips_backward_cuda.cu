// The fast path of neighborhood attention's backward pass: kernels march down strips; the same bits every time.
//
// In two passes, or in one, fused_kernel (strips_backward_fused_cuda.cu), where a block can have 227 KB of shared memory:
//
// 1. queries_kernel: dq, −delta of each query, and one Part of each block for the others.
// 2. keys_kernel: dk and dv, from all queries that see a key.
// 3. sum_kernel: the gradient of cosine_scale from the parts, in a fixed order.
//
// Both compute logits s = ⟨q', k'⟩ of prepared (unit, rotated) heads and weights p = exp(factor·s − lse) again, then ds
// = p·(⟨dout, v⟩ − delta), delta = ⟨dout, out⟩ − dlse. Accumulators of one product are operands of the next as they
// are. dq and dk end with the gradients of rotation and normalisation: with y = x·n, dx = n·(g − y·⟨y, g⟩); and ⟨q',
// dq'⟩ is what the query adds to the gradient of cosine_scale.
//
// ds is rounded to float16 where q' and k' are (always but for plain bfloat16), scaled by a power of two that keeps it
// in float16's range whatever the magnitudes are: in the first kernel one for each query, by its dout and delta and the
// values that the block has met; in the second one for each key, by its value and the image's largest dout and delta.
// The scale leaves again in float32.
//
// A NaN or an infinity in a token may reach the gradients of tokens that share a tile with those that see it: what is
// masked becomes zero, but zero times NaN is NaN in a product of tiles.
#include "strips_backward.cuh"

namespace hdit {
namespace {

using namespace strips;

// ---- 3: the gradient of cosine_scale --------------------------------------------------------------------------------
// One warp for each head of each image.
__global__ void __launch_bounds__(32) sum_kernel(const BackwardArgs args) {
  const Part* parts = args.parts + int64_t(blockIdx.x) * args.parts_per_head;
  float sum = 0;
  for (int i = threadIdx.x; i < args.parts_per_head; i += 32) sum += core::load_global<Part>(parts + i).dcosine_scale;
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) core::store_global<float>(args.dcosine_scale + blockIdx.x, sum * args.forward.scale);
}

// ---- host side ------------------------------------------------------------------------------------------------------
constexpr int kMostRows = 192;  // of a segment: the tables of more would cost the second block on a multiprocessor

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
  layout.bytes = layout.sums + kMostWarps * 16;
  return layout;
}

// Cuts `height` rows into segments, once there are strips.
void cut_rows(Args& args, int height, int64_t images) {
  const int64_t at_once = int64_t(core::multiprocessors()) * kBlocksPerProcessor;
  args.rows = segment_rows(height, args.strips * images, at_once, kStep, args.window_rows + kStep, kMostRows);
  args.segments = (height + args.rows - 1) / args.rows;
}

bool strips_fit(int strips, int columns, int first_strip, int last_strip, int width, int window) {
  for (int i = 0; i < strips; ++i) {
    const KeyStrip strip = key_strip(i, strips, columns, first_strip, last_strip, width);
    if (strip.end - strip.begin > columns) return false;
    for (int begin = strip.begin; begin < strip.end; begin += kTileColumns)
      if (!tile_fits(begin, strip.end, width, window)) return false;
  }
  return true;
}

// Cuts the columns into strips of keys, none of whose tiles is seen by queries of more than 16 columns. A tile of which
// only some keys lie at a border may be; then strips begin before the image, or the last one before it has to. (False
// where there is no way: a window of 9 in 17 columns has a key that all 17 queries see; or strips of one tile.)
bool cut_columns_of_keys(BackwardArgs& args, int columns) {
  const int width = args.forward.width, window = args.forward.window_columns;
  for (int more = 0; more < 2; ++more)
    for (int before = 0; before < kTileColumns; ++before) {
      const int strips = (width + before + columns - 1) / columns + more, last = -before + (strips - 1) * columns;
      for (int shift = 0; shift < (strips == 1 ? 1 : columns); ++shift) {
        if (!strips_fit(strips, columns, -before, last - shift, width, window)) continue;
        args.forward.strips = strips, args.first_strip = -before, args.last_strip = last - shift;
        return true;
      }
    }
  return false;
}

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

// The plans: as many warps in a block as shared memory allows, none if not even one.
BackwardArgs plan_queries(BackwardArgs args, const NeighborhoodAttentionBackward& a, int64_t most_bytes) {
  Args& f = args.forward;
  for (args.warps = kMostWarps; args.warps > 0; --args.warps) {
    const int columns = kTileColumns * args.warps;
    f.strips = (f.width + columns - 1) / columns;
    cut_rows(f, f.height, images(a));
    args.layout = layout_of(int(a.forward.dim), args.warps, f.window_rows + 2 * kStep - 1,
                            f.rows + f.window_rows + 2 * kStep, false);
    if (args.layout.bytes <= most_bytes) break;
  }
  args.parts_per_head = f.strips * f.segments;
  return args;
}

// The most rows of queries that see two rows of keys, counted in pairs from first_row; at borders more than window + 1.
int most_rows_of_queries(int first_row, int height, int window) {
  int rows = 0;
  for (int y = first_row; y < height; y += kStep)
    rows = most(rows, last_query(least(y + 1, height - 1), height, window) + 1 - first_query(most(y, 0), window));
  return rows;
}

BackwardArgs plan_keys(BackwardArgs args, const NeighborhoodAttentionBackward& a, int64_t most_bytes) {
  Args& f = args.forward;
  const int even = most_rows_of_queries(0, f.height, f.window_rows);
  const int odd = most_rows_of_queries(-1, f.height, f.window_rows);
  args.first_row = odd < even ? -1 : 0;
  const int ring = most(least(odd, even), f.window_rows + 2 * kStep - 1);  // and, if possible, the rows that come next
  for (args.warps = kMostWarps; args.warps > 0; --args.warps) {
    if (!cut_columns_of_keys(args, kTileColumns * args.warps)) continue;
    cut_rows(f, f.height - args.first_row, images(a));
    args.layout = layout_of(int(a.forward.dim), args.warps, ring, f.rows + 2 * f.window_rows, true);
    if (args.layout.bytes <= most_bytes) break;
  }
  return args;
}

bool takes(const NeighborhoodAttentionBackward& a) {
  const NeighborhoodAttention& f = a.forward;
  const auto fits = [&](const Tokens& x) { return x.data == nullptr || strips::takes(x, f); };
  return strips::takes(f) && (f.dim == 32 || f.dim == 64 || f.dim == 128) && a.dout.data != nullptr && aligned(f.out) &&
         fits(a.dout) && fits(a.dq) && fits(a.dk) && fits(a.dv);
}

std::string describe(const NeighborhoodAttention& a) {
  std::string text = "neighborhood_attention_backward(";
  for (const int64_t size : {a.batch, a.rows.length, a.columns.length, a.heads, a.dim})
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

bool neighborhood_attention_strips_backward_cuda(const NeighborhoodAttentionBackward& a, void* workspace,
                                                 void* stream) {
  if (!takes(a)) return false;
  if (images(a) == 0) return true;
  const int64_t most_bytes = int64_t(core::most_shared_bytes());
  const std::string call = describe(a.forward);
  BackwardArgs args = args_of(a);
  args.parts = static_cast<Part*>(workspace);
  if (plan_fused(args, a.forward, most_bytes)) {
    launch_fused(args, a.forward, call, stream);
  } else {
    const BackwardArgs both = args_of(a);
    BackwardArgs queries = plan_queries(both, a, most_bytes), keys = plan_keys(both, a, most_bytes);
    if (queries.warps == 0 || keys.warps == 0) return false;
    queries.parts = keys.parts = args.parts;
    queries.neg_delta = keys.neg_delta = reinterpret_cast<float*>(queries.parts + images(a) * queries.parts_per_head);
    args.parts_per_head = keys.parts_per_head = queries.parts_per_head;
    launch_queries(queries, a.forward, call, stream);
    if (a.dk.data != nullptr || a.dv.data != nullptr) launch_keys(keys, a.forward, call, stream);
  }
  if (a.dcosine_scale != nullptr)
    core::launch(call + ", sum", sum_kernel, dim3(unsigned(images(a))), dim3(32), 0, stream, args);
  return true;
}

}  // namespace hdit
