// What the kernels of strips_backward_*_cuda.cu share: their arguments, rows of tokens that stream through rings in
// shared memory, and products of a tile of 2 × 8 tokens with 16 tokens of a ring row.
#pragma once

#include "strips.cuh"

namespace hdit {
namespace strips {

constexpr int kMostWarps = 4;  // of a block: strips of 8·warps columns
constexpr int kStep = 2;       // rows that a block advances by
constexpr int kBlocksPerProcessor = 2;

// What a block of queries_kernel leaves for the others: 16 bytes.
struct alignas(16) Part {
  float dcosine_scale;  // short of `scale`
  float dout, delta;    // the largest magnitudes of dout's elements and of delta
  float unused;
};

// What a block has in shared memory: ring of prepared tokens, of raw ones, of scalars (keys_kernel), tables, sums.
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
  int warps;
  int first_strip, last_strip;  // keys: the columns at which the first and the last strip begin
  int first_row;                // keys: the row at which the first segment begins
  uint32_t nothing;  // 0, as the compiler does not know: x | nothing has a register of its own, else x is moved to one
};

// The numbers of a Part, as a thread knows them.
struct Totals {
  float dcosine_scale, dout, delta;
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

// Whether the queries that see keys begin … end − 1 of a tile lie within the 16 columns that the tile is multiplied
// with.
inline bool tile_fits(int begin, int end, int width, int window) {
  const int first = begin - keys_reach_back(window), low = begin > 0 ? begin : 0;
  const int high = (end < begin + kTileColumns ? end : begin + kTileColumns) - 1;
  if (low > high) return true;
  return first_query(low, window) >= first && last_query(high, width, window) < first + 16;
}

// Enqueue the kernels; `call` names the op and its shape.
void launch_queries(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call, void* stream);
void launch_keys(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call, void* stream);
void launch_fused(const BackwardArgs& args, const NeighborhoodAttention& a, const std::string& call, void* stream);
// How to launch the fused kernel; false where it does not apply, or not with so many bytes of shared memory.
bool plan_fused(BackwardArgs& args, const NeighborhoodAttention& a, int64_t most_bytes);

// launch(element, cosine) or launch(dim, element, cosine), as types that a kernel is a template of.
template <class Launch>
void with_element_types(const NeighborhoodAttention& a, Launch launch) {
  const auto with_element = [&](auto cosine) {
    if (a.dtype == DType::bfloat16) launch(BFloat16(), cosine);
    else launch(Float16(), cosine);
  };
  if (a.cosine_scale != nullptr) with_element(std::true_type());
  else with_element(std::false_type());
}

template <class Launch>
void with_kernel_types(const NeighborhoodAttention& a, Launch launch) {
  with_element_types(a, [&](auto element, auto cosine) {
    if (a.dim == 128) launch(std::integral_constant<int, 128>(), element, cosine);
    else if (a.dim == 64) launch(std::integral_constant<int, 64>(), element, cosine);
    else launch(std::integral_constant<int, 32>(), element, cosine);
  });
}

inline void launch_blocks(const std::string& call, void (*kernel)(BackwardArgs), const BackwardArgs& args,
                          int64_t batch, void* stream) {
  const int64_t blocks = batch * args.forward.heads * args.forward.segments * args.forward.strips;
  core::launch(call, kernel, dim3(unsigned(blocks)), dim3(32 * args.warps), args.layout.bytes, stream, args);
}

// Position of a token's head in (batch, height, width, heads) tensors.
DEVICE int64_t scalar_at(const Args& args, const Place& place, int y, int x) {
  return ((int64_t(place.image) * args.height + y) * args.width + x) * args.heads + place.head;
}

DEVICE char* token_at(const Tensor& x, char* image, int row, int column) {
  return image + int64_t(row) * int(x.height_stride) + int64_t(column) * x.width_stride;
}

template <class T>
DEVICE float dot_of_words(uint32_t a, uint32_t b, float sum) {
  sum = fmaf(low<T>(a), low<T>(b), sum);
  return fmaf(high<T>(a), high<T>(b), sum);
}

// ---- rows of two tensors on their way through a ring ----------------------------------------------------------------
// x is prepared there, y stays as it is. A ring row holds `columns` tokens, a multiple of 8: 8 tokens to a warp at a
// time, four lanes to each.
template <int dim>
struct Stream {
  static constexpr int kToken = 2 * dim, kCopies = dim / 32;
  Tensor x, y;
  char *x_image, *y_image;
  uint32_t x_ring, y_ring, row_table, column_table;
  int first_row, first_column, columns, ring, height, width, window_rows, window_columns;
  int groups;  // of 8 columns that are wanted

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
    const int warp = core::uniform(threadIdx.x / 32), warps = blockDim.x / 32;
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

  // Which token of the image stands at a ring column, or for one beyond it that nobody sees.
  DEVICE int nearest_column(int column) const { return most(0, least(first_column + column, width - 1)); }

  // Starts the copies of rows `row` …; more(row, column in the image, slot · columns + ring column). `wraps`: rows and
  // columns beyond the image are those that a window at its border sees in their place.
  template <bool wraps, class More>
  DEVICE void load(int row, int count, int slot, More more) const {
    const int t = threadIdx.x % 4;
    tokens(row, count, slot, [&](int at_row, int at_slot, int column) {
      const int image_row = wraps ? wrapped(at_row, height, window_rows) : at_row;
      const int image_column = wraps ? wrapped(first_column + column, width, window_columns) : nearest_column(column);
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

  // Prepares what `load` with the same arguments copied, after copy_async_wait and by the same lanes; more(slot ·
  // columns + ring column, where the token of y lies, row, ring column, 1 / the token's length).
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
      more(at_slot * columns + column, at + (y_ring - x_ring), at_row, column, inverse_length);
    });
  }

  // The lane's share of a raw token of y, at what `prepare` gives.
  DEVICE Quarter<dim> load_y(uint32_t at) const {
    Quarter<dim> x;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      const uint4 w = core::load_shared<uint4>(at ^ (4 * c + int(threadIdx.x) % 4) << 4);
      x.word[4 * c] = w.x, x.word[4 * c + 1] = w.y, x.word[4 * c + 2] = w.z, x.word[4 * c + 3] = w.w;
    }
    return x;
  }
};

// ---- what both kernels do with tiles --------------------------------------------------------------------------------
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

// Where a lane finds 16 neighbouring tokens of a ring row, from its begin, which is aligned to a token; dim·16 bytes are
// 8 tokens, which keep the swizzle.
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

// products[n] = tile · (8 tokens n)ᵀ, for prepared tokens of a ring row.
template <int dim, class T, int eights>
DEVICE void times_prepared(float (&products)[eights][4], const Fragments<dim>& tile, uint32_t row,
                           const Sixteen<dim>& places) {
  const float zero[4] = {0, 0, 0, 0};
#pragma unroll
  for (int n = 0; n < eights; ++n)
#pragma unroll
    for (int c = 0; c < dim / 32; ++c) {
      uint32_t b[4];
      core::ldmatrix_x4(b, row + n * (16 * dim) + (places.prepared_at ^ c << 6));
      if (c == 0) multiply<T>(products[n], zero, tile[0], b[0], b[1]);
      else multiply<T>(products[n], tile[2 * c], b[0], b[1]);
      multiply<T>(products[n], tile[2 * c + 1], b[2], b[3]);
    }
}

// products[n] = start[n] + tile · (8 tokens n)ᵀ, for raw ones.
template <int dim, class T, int eights>
DEVICE void times_raw(float (&products)[eights][4], const float (&start)[eights][4], const Fragments<dim>& tile,
                      uint32_t row, const Sixteen<dim>& places) {
#pragma unroll
  for (int n = 0; n < eights; ++n)
#pragma unroll
    for (int c = 0; c < dim / 32; ++c) {
      const uint4 b = core::load_shared<uint4>(row + n * (16 * dim) + (places.raw_at ^ c << 6));
      if (c == 0) multiply<T>(products[n], start[n], tile[0], b.x, b.y);
      else multiply<T>(products[n], tile[2 * c], b.x, b.y);
      multiply<T>(products[n], tile[2 * c + 1], b.z, b.w);
    }
}

// sums += weights · (16 tokens), over tokens; sums[c]: the features of chunk c.
template <int dim, class T>
DEVICE void add_weighted(float (&sums)[dim / 8][4], const uint32_t (&weights)[4], uint32_t row,
                         const Sixteen<dim>& places) {
#pragma unroll
  for (int c = 0; c < dim / 16; ++c) {
    uint32_t b[4];
    core::ldmatrix_x4_trans(b, row + (places.transposed_at ^ c << 5));
    multiply<T>(sums[2 * c], weights, b[0], b[1]);
    multiply<T>(sums[2 * c + 1], weights, b[2], b[3]);
  }
}

// Accumulators of two columns of 8 tokens as one left operand, and nothing where `seen` has no bits: [8 tokens][tile
// row].
template <class T>
DEVICE void pack_seen(uint32_t (&words)[4], const float (&x)[2][4], const uint32_t (&seen)[2][2]) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      words[2 * n + half] = pack<T>(x[n][2 * half], x[n][2 * half + 1]) & seen[n][half];
}

// factor · the gradient of a token, of which row `half` of `sums` has that of the prepared one; returns this lane's
// part of ⟨prepared, its gradient⟩.
template <int dim, class T, bool cosine>
DEVICE float gradient_of_token(Quarter<dim>& result, const float (&sums)[dim / 8][4], int half,
                               const Quarter<dim>& prepared, float inverse_length, float factor, uint32_t angles_at) {
  constexpr int kPairs = dim / 16;
  float g[dim / 4], unit[dim / 4], part = 0;
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) g[2 * c] = sums[c][2 * half], g[2 * c + 1] = sums[c][2 * half + 1];
  if constexpr (cosine) {
    unpack<dim, Held<T, cosine>>(unit, prepared);
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

// The largest magnitude of a quarter's elements; NaN does not count.
template <int dim, class T>
DEVICE float largest_of(const Quarter<dim>& quarter) {
  uint32_t x = 0;
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) {
    if constexpr (std::is_same_v<T, BFloat16>) x = core::max_magnitude_bf16(x, quarter.word[c]);
    else x = core::max_magnitude_f16(x, quarter.word[c]);
  }
  return fmaxf(low<T>(x), high<T>(x));
}

// What others' gradients are scaled by: an infinity would take all their digits.
DEVICE float if_finite(float magnitude) { return magnitude < INFINITY ? magnitude : 0.0f; }

// The exponent e with which ds·2^e, of queries whose dout has no element beyond `dout`, and so on, stays within
// float16.
template <int dim>
DEVICE float exponent_of_ds(float dout, float value, float delta) {
  const float most = fmaf(dim * dout, value, delta);
  return fminf(fmaxf(14.0f - ceilf(core::log2(most)), -100.0f), 100.0f);
}

DEVICE float max_of_token(float x) {
  x = fmaxf(x, core::shuffle_xor(x, 1));
  return fmaxf(x, core::shuffle_xor(x, 2));
}

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
  stream.columns = layout.columns, stream.groups = layout.columns / 8, stream.ring = layout.ring;
  stream.height = f.height, stream.width = f.width;
  stream.window_rows = f.window_rows, stream.window_columns = f.window_columns;
}

// ---- keys -------------------------------------------------------------------------------------------------------------
// 2 × 8 keys; token g of rows y and y + 1.
template <int dim>
struct KeyTile {
  Fragments<dim> k, v;
  float inverse_length[2];
};

// The same as they are in memory.
template <int dim>
struct RawKeys {
  Quarter<dim> k[2], v[2];
};

template <int dim>
DEVICE RawKeys<dim> load_keys(const BackwardArgs& args, char* k_image, char* v_image, const int (&y)[2], int x) {
  const int t = threadIdx.x % 4;
  RawKeys<dim> raw;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    raw.k[half] = load_quarter<dim>(token_at(args.forward.k, k_image, y[half], x), t);
    raw.v[half] = load_raw<dim>(token_at(args.forward.v, v_image, y[half], x), t, args.nothing);
  }
  return raw;
}

template <int dim, class T, bool cosine>
DEVICE void prepare_keys(KeyTile<dim>& tile, const RawKeys<dim>& raw, const Stream<dim>& stream, const int (&y)[2],
                         int x) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Angles<dim> angles = load_angles<dim>(stream.angles_at(y[half], x - stream.first_column, t));
    put<dim>(tile.k, half, prepared<dim, T, cosine>(raw.k[half], angles, 1.0f, tile.inverse_length[half]));
    put<dim>(tile.v, half, raw.v[half]);
  }
}

// Which gradients a march over the rows of queries adds up. Heads of 128 leave no registers for both at once.
enum class Sums { both, keys, values };

// Accumulators hold features 2t, 2t + 1 of every chunk of 8. Neighbours exchange, so that a lane has 4 features
// together. The token becomes factor · them.
template <int dim, class T>
DEVICE void store_sums(char* token, const float (&sums)[dim / 8][4], int half, float factor, bool mine) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2;
  uint32_t word[dim / 8];
#pragma unroll
  for (int c = 0; c < dim / 8; ++c) word[c] = pack<T>(sums[c][2 * half] * factor, sums[c][2 * half + 1] * factor);
#pragma unroll
  for (int c = 0; c < dim / 8; c += 2) {
    const uint32_t got = core::shuffle_xor(odd ? word[c] : word[c + 1], 1);
    (odd ? word[c] : word[c + 1]) = got;
    if (mine) core::store_global<uint2>(token + 16 * (c + t % 2) + 8 * (t / 2), uint2{word[c], word[c + 1]});
  }
}

// dk and dv of a tile, from the sums that `sums` says, times key_factors of the row or value_factor; `mine`: of which
// row.
template <int dim, class T, bool cosine, Sums sums>
DEVICE void store_keys(const float (&dk)[dim / 8][4], const float (&dv)[dim / 8][4], const KeyTile<dim>& tile,
                       const BackwardArgs& args, char* dk_image, char* dv_image, const Stream<dim>& stream,
                       const int (&y)[2], int x, const bool (&mine)[2], const float (&key_factors)[2],
                       float value_factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (sums != Sums::values) {
      Quarter<dim> result;
      gradient_of_token<dim, T, cosine>(result, dk, half, take<dim>(tile.k, half), tile.inverse_length[half],
                                        key_factors[half], stream.angles_at(y[half], x - stream.first_column, t));
      if (mine[half] && args.dk.data != nullptr)
        store_quarter<dim>(token_at(args.dk, dk_image, y[half], x), t, result);
    }
    if constexpr (sums != Sums::keys)
      store_sums<dim, T>(token_at(args.dv, dv_image, y[half], x), dv, half, value_factor,
                         mine[half] && args.dv.data != nullptr);
  }
}

}  // namespace strips
}  // namespace hdit
