// What the passes of attention's general path share. It serves every window, size, layout and option, in float32
// arithmetic for all element types, and is float32's path for the common cases too.
//
// A block of 128 threads owns a tile of 64 tokens of one head and one dilation class (with dilation d, every d-th token
// makes a grid of its own): queries or, for gradients of keys, keys. It walks over tiles of 64 tokens of the other
// kind, all that any of its own sees or is seen by, brings each to shared memory, rotated and in float32, and
// multiplies. The 16 own tokens of a warp skip tiles that none of them sees; what only some of them see is masked.
//
// A tile in shared memory is 64 rows of 64 features (a chunk of a head); longer heads are added up chunk by chunk, and
// results of more than 64 features are made by several blocks, each of which computes the softmax for itself. A product
// over features does not care about their order: a thread holds "pairs", four features and the four that turn with
// them, at 4·pair and 32 + 4·pair of a row (Heads::feature). Heads are divided by their lengths after the products: a
// row need not be whole for them to begin.
//
// A thread multiplies 4 own rows with 8 others (or with 8 features): per 128 multiply-adds 12 shared loads of 16 bytes.
// Eight lanes that take turns at shared memory read one own row, or eight others whose 16-byte units the rows' numbers
// permute.
//
// A NaN or an infinity in k or v may reach queries that share a tile with those that see it: what is masked is
// multiplied by 0.
#pragma once

#include "core.cuh"
#include "neighborhood_attention.h"

namespace hdit {
namespace general {

constexpr int kThreads = 128, kSlots = 64, kFeatures = 64;
constexpr uint32_t kRowBytes = 4 * kFeatures, kTileBytes = kSlots * kRowBytes;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;  // where a running maximum begins: −inf less −inf is no number
constexpr float kEpsilon = 1e-6f;

template <class V>
DEVICE V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
DEVICE V larger(V a, V b) {
  return a > b ? a : b;
}

// ---- functions of more digits than the special function unit has, for float32 ---------------------------------------
// 2^x to 2e-8 and a rounding; 0 below 2^−125. The polynomial for |fraction| ≤ 1/2 is Cephes'.
DEVICE float exp2_exact(float x) {
  const float rounder = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, in the low bits
  const float bounded = x < -125.0f ? -125.0f : x, shifted = bounded + rounder;
  const float fraction = bounded - (shifted - rounder);
  float p = 1.535336188319500e-4f * fraction + 1.339887440266574e-3f;
  p = p * fraction + 9.618437357674640e-3f;
  p = p * fraction + 5.550332471162809e-2f;
  p = p * fraction + 2.402264791363012e-1f;
  p = p * fraction + 6.931472028550421e-1f;
  p = p * fraction + 1.0f;
  return x < -125.0f ? 0.0f : p * core::as_float((core::as_bits(shifted) + 127) << 23);
}
// For weights of values in T.
template <class T>
DEVICE float weight_of(float logit) {
  if constexpr (sizeof(T) == 4) return exp2_exact(logit);
  else return core::exp2(logit);
}
DEVICE float log2_exact(float x) {
  const float y = core::log2(x);
  return y + (x * exp2_exact(-y) - 1.0f) * kLog2e;
}

// ---- windows along one axis of a class of `size` tokens -------------------------------------------------------------
struct Axis {
  int length, kernel, stride, dilation;
  bool causal;

  DEVICE int class_size(int member) const { return (length - member + dilation - 1) / dilation; }
  // The keys of a query: [begin, end)
  DEVICE int window_begin(int query, int size) const {
    const int leader = smaller(query / stride * stride + (causal ? stride - 1 : stride / 2), size - 1);
    return causal ? larger(leader - kernel + 1, 0) : smaller(larger(leader - kernel / 2, 0), size - kernel);
  }
  DEVICE int window_end(int query, int begin) const { return causal ? query + 1 : begin + kernel; }
  // The queries that see a key lie in [begin, end); with strides not all of these do.
  DEVICE int readers_begin(int key) const {
    if (causal) return key;
    if (key < kernel) return 0;
    return larger((key - kernel + 1 + kernel / 2 - stride / 2 + stride - 1) / stride * stride, 0);
  }
  DEVICE int readers_end(int key, int size) const {
    if (key >= size - kernel) return size;
    if (causal) return smaller((key + kernel - stride) / stride * stride + stride, size);
    return smaller((key + kernel / 2 - stride / 2 + stride) / stride * stride, size);
  }
};

// Places of a class: rows and columns, [begin, end) of each.
struct alignas(16) Box {
  int row_begin, row_end, column_begin, column_end;
  DEVICE bool holds(int row, int column) const {
    return row >= row_begin && row < row_end && column >= column_begin && column < column_end;
  }
};

// ---- what a launch is told ------------------------------------------------------------------------------------------
struct Plan {
  Axis rows, columns;
  int heads, dim, v_dim, angles, extra;
  int own_log, other_log;  // a tile has 2^log columns and 64 / 2^log rows
  int down, across;        // own tiles of a class
  int dim_chunks, v_chunks;
  int chunks;     // blocks for each tile
  int segments;   // of the queries, for gradients of additional keys: each a block, of …
  int per_segment;  // … so many tiles
  bool wide;      // every head of every tensor can be read four features at a time
  bool alone;     // a query has one key at most, whose weight is 1 whatever rounding says
  float scale;
};

// The common case, of which float32 has kernels of its own: heads of 64 features, four at a time, no additional tokens.
template <class T>
constexpr bool kCommonOf = sizeof(T) == sizeof(float);
template <class T>
bool is_common(const Plan& plan) {
  return kCommonOf<T> && plan.dim == kFeatures && plan.v_dim == kFeatures && plan.extra == 0 && plan.wide &&
         !plan.alone;
}

// What a kernel reads instead of `plan`: with kCommon the compiler knows the sizes, and leaves out what else there
// could be.
template <bool kCommon>
DEVICE Plan known(Plan plan) {
  if constexpr (kCommon) {
    plan.dim = plan.v_dim = kFeatures;
    plan.dim_chunks = plan.v_chunks = plan.chunks = 1;
    plan.extra = 0;
    plan.wide = true, plan.alone = false;
  }
  return plan;
}

struct Call {
  NeighborhoodAttentionBackward g;  // of a forward pass: g.forward
  Plan plan;
  float4* notes;  // (batch, height, width, heads): what a query's weights are computed from, see backward
  double* parts;  // (batch, heads, tiles): of cosine_scale's gradient
  float* sums;    // (segments, batch, heads, extra, dim + v_dim + 4): of the gradients of additional tokens
};

// ---- where blocks, tiles and threads are ----------------------------------------------------------------------------
struct Block {
  int row_class, column_class, row, column;  // of the own tile: its class, its first place
  int n_rows, n_columns;                     // of the class
  int chunk, head;
  int64_t batch, tile;  // tile: its number among all of its head

  DEVICE explicit Block(const Plan& plan) {
    unsigned id = core::opaque(uint32_t(blockIdx.x));  // found again at the end of a kernel, and not kept for it
    const auto take = [&](int n) {
      const unsigned i = id % n;
      id /= n;
      return int(i);
    };
    const int tile_column = take(plan.across);
    column_class = take(plan.columns.dilation);
    const int tile_row = take(plan.down);
    row_class = take(plan.rows.dilation);
    chunk = take(plan.chunks);
    head = take(plan.heads);
    batch = id;
    row = tile_row * (kSlots >> plan.own_log), column = tile_column << plan.own_log;
    n_rows = plan.rows.class_size(row_class), n_columns = plan.columns.class_size(column_class);
    const int64_t row_of_tiles = int64_t(row_class) * plan.down + tile_row;
    tile = (row_of_tiles * plan.columns.dilation + column_class) * plan.across + tile_column;
    tile += (batch * plan.heads + head) * plan.rows.dilation * plan.down * plan.columns.dilation * plan.across;
  }
  DEVICE bool empty() const { return row >= n_rows || column >= n_columns; }  // classes differ in size by one
};

struct Tile {
  int row, column, row_end, column_end;  // of places: the first, and where they end
  int log;
  int row_class, row_dilation, column_class, column_dilation;

  DEVICE int row_of(int slot) const { return row + (slot >> log); }
  DEVICE int column_of(int slot) const { return column + (slot & ((1 << log) - 1)); }
  DEVICE bool exists(int slot) const { return row_of(slot) < row_end && column_of(slot) < column_end; }
  DEVICE int y_of(int slot) const { return row_class + row_of(slot) * row_dilation; }
  DEVICE int x_of(int slot) const { return column_class + column_of(slot) * column_dilation; }
  // Places that exist, the nearest to a slot's.
  DEVICE int near_row(int slot) const { return smaller(row_of(slot), row_end - 1); }
  DEVICE int near_column(int slot) const { return smaller(column_of(slot), column_end - 1); }
};

DEVICE Tile tile_at(const Plan& plan, const Block& block, int row, int column, int log) {
  return {row, column, block.n_rows, block.n_columns, log, block.row_class, plan.rows.dilation, block.column_class,
          plan.columns.dilation};
}
DEVICE Tile own_tile(const Plan& plan, const Block& block) {
  return tile_at(plan, block, block.row, block.column, plan.own_log);
}
DEVICE Tile extra_tile(const Plan& plan, int first) { return {0, first, 1, plan.extra, 6, 0, 1, 0, 1}; }

// The keys that the queries of slots first … last see, the queries that see keys of these slots, the window of one
// query.
DEVICE Box keys_of(const Plan& plan, const Tile& tile, int first, int last) {
  const int row = tile.near_row(first), column = tile.near_column(first);
  const int last_row = tile.near_row(last), last_column = tile.near_column(last);
  const int row_begin = plan.rows.window_begin(last_row, tile.row_end);
  const int column_begin = plan.columns.window_begin(last_column, tile.column_end);
  return {plan.rows.window_begin(row, tile.row_end), plan.rows.window_end(last_row, row_begin),
          plan.columns.window_begin(column, tile.column_end), plan.columns.window_end(last_column, column_begin)};
}
DEVICE Box readers_of(const Plan& plan, const Tile& tile, int first, int last) {
  return {plan.rows.readers_begin(tile.near_row(first)), plan.rows.readers_end(tile.near_row(last), tile.row_end),
          plan.columns.readers_begin(tile.near_column(first)),
          plan.columns.readers_end(tile.near_column(last), tile.column_end)};
}
DEVICE Box window_of(const Plan& plan, const Tile& tile, int slot) { return keys_of(plan, tile, slot, slot); }

// A thread's part of every product: own rows 16·warp + group + 4i, i < 4; others 8j + member, or the features of pair
// `member`.
struct Thread {
  int warp, group, member;
  DEVICE Thread() : Thread(core::uniform(threadIdx.x / 32)) {}
  DEVICE explicit Thread(int warp_) : warp(warp_) {
    const uint32_t lane = core::opaque(uint32_t(threadIdx.x)) % 32;
    group = lane / 8, member = lane % 8;
  }
  // The same, of which the compiler does not know it: what is computed from it in a loop is not kept for the next time.
  DEVICE Thread again() const { return Thread(warp); }
  DEVICE int own(int i) const { return 16 * warp + group + 4 * i; }
  DEVICE int other(int j) const { return 8 * j + member; }
};

// What a block walks over: tiles of a box, column by column.
struct Walk {
  Box box;
  int log, down, steps;
  DEVICE Walk(const Box& walked, int tile_log) : box(walked), log(tile_log) {
    down = (box.row_end - box.row_begin + (kSlots >> log) - 1) / (kSlots >> log);
    steps = down * ((box.column_end - box.column_begin + (1 << log) - 1) >> log);
  }
  DEVICE int row(int step) const { return box.row_begin + step % down * (kSlots >> log); }
  DEVICE int column(int step) const { return box.column_begin + (step / down << log); }
};

// The others that a warp needs of a tile: units of four slots, [begin, end); none where they do not meet.
struct Units {
  int begin, end;
  DEVICE bool any() const { return begin < end; }
};
DEVICE Units units_of(const Tile& tile, const Box& box) {
  const int first = larger(box.row_begin - tile.row, 0), last = smaller(box.row_end - tile.row, kSlots >> tile.log);
  const bool apart =
      box.column_begin >= tile.column + (1 << tile.log) || box.column_end <= tile.column || first >= last;
  return apart ? Units{0, 0} : Units{(first << tile.log) >> 2, ((last << tile.log) + 3) >> 2};
}

// ---- shared memory --------------------------------------------------------------------------------------------------
struct Memory {
  uint32_t own, other, other_values, weights, own_values;  // tiles; own_values only in a backward pass
  uint32_t windows;                // a Box for each query of a tile
  // A float4 for each slot, of which the last is 1 / length of the head, or −1 if it is hidden.
  uint32_t own_notes, other_notes;
  uint32_t own_turns, other_turns;  // (cos, sin) of the angles of a tile's rows, then of its columns

  static constexpr uint32_t bytes(int tiles) { return tiles * kTileBytes + 3 * 16 * kSlots; }
  DEVICE Memory(const Plan& plan, int tiles) {
    own = core::dynamic_shared();
    other = own + kTileBytes, other_values = own + 2 * kTileBytes, weights = own + 3 * kTileBytes;
    own_values = own + 4 * kTileBytes;
    windows = own + tiles * kTileBytes, own_notes = windows + 16 * kSlots, other_notes = own_notes + 16 * kSlots;
    own_turns = other_notes + 16 * kSlots;
    other_turns = own_turns + 8 * plan.angles * ((kSlots >> plan.own_log) + (1 << plan.own_log));
  }
};
// What one tile's turns take.
inline uint32_t turns_bytes(int angles, int log) { return 8 * angles * ((kSlots >> log) + (1 << log)); }

DEVICE uint32_t note_at(uint32_t notes, int slot, int i) { return notes + 16 * slot + 4 * i; }

// ---- heads in global memory -----------------------------------------------------------------------------------------
// One head of all tokens of a batch item, and how its features lie in pairs: `size` features of which 4r turn.
template <class T>
struct Heads {
  using Element = std::remove_const_t<T>;
  T* data;
  int64_t row_stride, column_stride;
  int size, r;
  bool wide;

  template <class Where>  // with a batch item and a head
  DEVICE Heads(const Tokens& tokens, const Where& where, int size_, int r_, bool wide_)
      : data(static_cast<T*>(tokens.data)), row_stride(tokens.height_stride), column_stride(tokens.width_stride),
        size(size_), r(r_), wide(wide_) {
    if (data != nullptr) data += where.batch * tokens.batch_stride + where.head * tokens.head_stride;
  }
  // One head alone.
  DEVICE Heads(T* head, int size_, int r_, bool wide_)
      : data(head), row_stride(0), column_stride(0), size(size_), r(r_), wide(wide_) {}
  DEVICE T* at(int y, int x) const { return data + y * row_stride + x * column_stride; }
  DEVICE int pairs(int chunk) const { return smaller((size - kFeatures * chunk + 7) / 8, 8); }

  // The e-th feature of a pair's first or second four, or `size` or more where there is none. Those that turn together
  // are 2r apart, the others half of what is left, so that neighbouring threads read neighbouring features.
  DEVICE int feature(int pair, int half, int e) const {
    const int n = 4 * pair + e, rest = size - 4 * r, apart = wide ? (rest + 7) / 8 * 4 : (rest + 1) / 2;
    if (n < 2 * r) return n + half * 2 * r;
    return n - 2 * r < apart ? n + 2 * r + half * apart : size;
  }
  // Zeros for features that do not exist, and for all of a token that is not shown.
  DEVICE void read(const T* token, int pair, bool shown, Pack<Element, 4> (&x)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[half].lane[e] = core::from_float<Element>(0.0f);
      if (!shown) continue;
      if (wide) {
        if (feature(pair, half, 0) < size) x[half] = load<4>(token + feature(pair, half, 0));
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (feature(pair, half, e) < size)
            x[half].lane[e] = core::load_global<Element>(token + feature(pair, half, e));
      }
    }
  }
  DEVICE void write(T* token, int pair, const float (&x)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (wide) {
        Pack<T, 4> four;
#pragma unroll
        for (int e = 0; e < 4; ++e) four.lane[e] = core::from_float<T>(x[4 * half + e]);
        if (feature(pair, half, 0) < size) store(token + feature(pair, half, 0), four);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (feature(pair, half, e) < size)
            core::store_global(token + feature(pair, half, e), core::from_float<T>(x[4 * half + e]));
      }
    }
  }
};

// ---- rotations ------------------------------------------------------------------------------------------------------
// cos and sin of the angles of a tile's rows and columns.
DEVICE void fill_turns(uint32_t turns, const NeighborhoodAttention& args, const Plan& plan, const Tile& tile,
                       int head) {
  const int rows = kSlots >> tile.log, r = plan.angles;
  for (int i = threadIdx.x; i < (rows + (1 << tile.log)) * r; i += kThreads) {
    const int place = i / r, n = i - place * r;
    const bool is_row = place < rows;
    const int at = is_row ? smaller(tile.row + place, tile.row_end - 1)
                          : smaller(tile.column + place - rows, tile.column_end - 1);
    const int token = is_row ? tile.row_class + at * tile.row_dilation : tile.column_class + at * tile.column_dilation;
    const float* angles = static_cast<const float*>(is_row ? args.height_angles : args.width_angles);
    float2 turn;
    core::sincos(core::load_global<float>(angles + (int64_t(token) * plan.heads + head) * r + n), turn.x, turn.y);
    core::store_shared(turns + 8 * i, turn);
  }
}

// Turns the pair of a slot's head forward (sign 1) or back (−1).
DEVICE void turn(uint32_t turns, const Tile& tile, int slot, int pair, int r, float sign, float (&x)[8]) {
  const uint32_t row = turns + 8 * r * (slot >> tile.log);
  const uint32_t column = turns + 8 * r * ((kSlots >> tile.log) + (slot & ((1 << tile.log) - 1)));
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int n = 4 * pair + e;
    if (n >= 2 * r) continue;
    const float2 turn = core::load_shared<float2>(n < r ? row + 8 * n : column + 8 * (n - r));
    const float first = x[e], second = x[4 + e], sine = turn.y * sign;
    x[e] = first * turn.x - second * sine;
    x[4 + e] = second * turn.x + first * sine;
  }
}

// ---- tiles into shared memory ---------------------------------------------------------------------------------------
// Which part of a tile a thread brings: one pair of the chunk, for four tokens, slots first + 16p. (Opaque: what is
// computed from it would else be kept in registers from tile to tile.)
struct Part {
  int pair, first;
  DEVICE Part() {
    const uint32_t thread = core::opaque(uint32_t(threadIdx.x));
    pair = thread % 8, first = thread / 8;
  }
  DEVICE int slot(int p) const { return first + 16 * p; }
};

template <class T>
struct Brought {
  Pack<T, 4> x[4][2];
  bool shown[4];
};

// From global memory to registers. mask: of the batch item's tokens, or null.
template <class T>
DEVICE void fetch(Brought<T>& brought, const Heads<const T>& heads, const Tile& tile, int chunk, const bool* mask,
                  int width) {
  const Part part;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int slot = part.slot(p), y = tile.y_of(slot), x = tile.x_of(slot);
    bool shown = tile.exists(slot) && heads.data != nullptr;
    if (shown && mask != nullptr) shown = core::load_global<bool>(mask + int64_t(y) * width + x);
    brought.shown[p] = shown;
    heads.read(heads.at(y, x), 8 * chunk + part.pair, shown, brought.x[p]);
  }
}

DEVICE float4 four_of(const float (&x)[8], int half) {
  return make_float4(x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]);
}

// Where the first four features of a pair lie in a tile; the others lie 128 bytes on.
DEVICE uint32_t pair_at(uint32_t tile, int slot, int pair) {
  return tile + slot * kRowBytes + 16 * (pair ^ (slot & 7));
}

// From registers to a tile; turned unless `turns` is 0.
template <class T>
DEVICE void put(const Brought<T>& brought, uint32_t to, const Tile& tile, int chunk, uint32_t turns, int r) {
  const Part part;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = core::to_float(brought.x[p][e / 4].lane[e % 4]);
    if (turns != 0) turn(turns, tile, part.slot(p), 8 * chunk + part.pair, r, 1.0f, x);
    core::store_shared(pair_at(to, part.slot(p), part.pair), four_of(x, 0));
    core::store_shared(pair_at(to, part.slot(p), part.pair) + kRowBytes / 2, four_of(x, 1));
  }
}

// Values of 64 features in float32, for which nothing is to be computed, from global memory to a tile without
// registers. There after copy_async_wait and a barrier.
template <class T>
DEVICE void copy(uint32_t to, const Heads<const T>& heads, const Tile& tile, int chunk, const bool* mask, int width) {
  const Part part;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int slot = part.slot(p), y = tile.y_of(slot), x = tile.x_of(slot);
    const uint32_t at = pair_at(to, slot, part.pair);
    bool shown = tile.exists(slot) && heads.data != nullptr;
    if (shown && mask != nullptr) shown = core::load_global<bool>(mask + int64_t(y) * width + x);
    if (shown) {
      const T* const from = heads.at(y, x) + heads.feature(8 * chunk + part.pair, 0, 0);
      core::copy_async_16(at, from);
      core::copy_async_16(at + kRowBytes / 2, from + kFeatures / 2);
    } else {
      core::store_shared(at, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
      core::store_shared(at + kRowBytes / 2, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
  }
  core::copy_async_commit();
}

// 1 / length of each head into its note, −1 of what is hidden. Squares are added up from the first chunk to the last.
template <class T>
DEVICE void put_lengths(const Brought<T>& brought, uint32_t notes, bool cosine, bool first, bool last) {
  const Part part;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint32_t note = note_at(notes, part.slot(p), 3);
    float squares = 0.0f;
    if (cosine) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float x = core::to_float(brought.x[p][e / 4].lane[e % 4]);
        squares += x * x;
      }
#pragma unroll
      for (int mask = 1; mask < 8; mask *= 2) squares += core::shuffle_xor(squares, mask);
    }
    if (part.pair != 0) continue;
    if (!first) squares += core::load_shared<float>(note);
    if (last) squares = !brought.shown[p] ? -1.0f : cosine ? core::inverse_root(squares + kEpsilon) : 1.0f;
    core::store_shared(note, squares);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------
DEVICE float dot(const float4& a, const float4& b) { return a.w * b.w + (a.z * b.z + (a.y * b.y + a.x * b.x)); }

// sums[i][j] += ⟨own row i of the thread, other row j⟩ over `pairs` pairs
DEVICE void multiply(const Thread& thread, uint32_t own, uint32_t other, int pairs, float (&sums)[4][8]) {
  const uint32_t own_row = own + thread.own(0) * kRowBytes, other_row = other + thread.other(0) * kRowBytes;
#pragma unroll 1
  for (int pair = 0; pair < pairs; ++pair) {
    const uint32_t even = own_row + 16 * (pair ^ thread.group), odd = own_row + 16 * (pair ^ thread.group ^ 4);
    const uint32_t from = other_row + 16 * (pair ^ thread.member);
    float4 a[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[i][half] = core::load_shared<float4>((i % 2 == 0 ? even : odd) + i * 4 * kRowBytes + half * kRowBytes / 2);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 b = core::load_shared<float4>(from + j * 8 * kRowBytes);
      const float4 c = core::load_shared<float4>(from + j * 8 * kRowBytes + kRowBytes / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i][j] += dot(a[i][0], b) + dot(a[i][1], c);
    }
  }
}

// The weights of a warp's own rows lie in 64 columns, one for each other row; only the eight lanes of a group share
// them.
DEVICE void put_weights(const Thread& thread, uint32_t weights, const float (&values)[4][8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int other = thread.other(j);
      const uint32_t row = weights + thread.own(i) * kRowBytes;
      core::store_shared(row + 16 * ((other / 4) ^ (2 * thread.group)) + 4 * (other % 4), values[i][j]);
    }
}

DEVICE void add_four(float* sums, float weight, const float4& x) {
  sums[0] += weight * x.x, sums[1] += weight * x.y, sums[2] += weight * x.z, sums[3] += weight * x.w;
}

// sums[i] += Σ weight · the thread's pair of other rows, of the units that the warp needs
DEVICE void accumulate(const Thread& thread, uint32_t weights, uint32_t other, const Units& units, int pairs,
                       float (&sums)[4][8]) {
  if (thread.member >= pairs) return;
  const uint32_t row = weights + thread.own(0) * kRowBytes;
#pragma unroll 1
  for (int unit = units.begin; unit < units.end; ++unit) {
    float4 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = core::load_shared<float4>(row + i * 4 * kRowBytes + 16 * (unit ^ (2 * thread.group)));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t from = pair_at(other, 4 * unit + n, thread.member);
      const float4 x = core::load_shared<float4>(from), y = core::load_shared<float4>(from + kRowBytes / 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = n == 0 ? w[i].x : n == 1 ? w[i].y : n == 2 ? w[i].z : w[i].w;
        add_four(sums[i], weight, x);
        add_four(sums[i] + 4, weight, y);
      }
    }
  }
}

// Over the eight lanes of a group.
DEVICE float sum_of_group(float x) {
  for (int mask = 1; mask < 8; mask *= 2) x += core::shuffle_xor(x, mask);
  return x;
}

// What multiplies q·k, or their cosine.
DEVICE float factor_of(const NeighborhoodAttention& args, const Plan& plan, int head) {
  const float* scales = static_cast<const float*>(args.cosine_scale);
  return scales == nullptr ? plan.scale : plan.scale * core::load_global<float>(scales + head);
}

DEVICE const bool* mask_of(const NeighborhoodAttention& args, const Plan& plan, int64_t batch) {
  return args.key_mask == nullptr ? nullptr : args.key_mask + batch * plan.rows.length * plan.columns.length;
}

// The number of a token's head in tensors of (batch, height, width, heads).
DEVICE int64_t number_of(const Plan& plan, const Block& block, int y, int x) {
  return ((block.batch * plan.rows.length + y) * plan.columns.length + x) * plan.heads + block.head;
}

// ---- host side ------------------------------------------------------------------------------------------------------
// For all passes but for the number of chunks that are blocks, which differs.
Plan plan_of(const NeighborhoodAttentionBackward& g, int (*chunks)(const Plan&));
uint32_t shared_bytes(const Plan& plan, int tiles);
// Blocks of a launch whose blocks own tiles of queries or keys of the grid.
unsigned blocks_of(const Plan& plan, int64_t batch);
int64_t tiles_of_head(const Plan& plan);
std::string describe(const char* name, const NeighborhoodAttention& args);

void forward(const NeighborhoodAttention& args, void* stream);
int64_t workspace_of(const NeighborhoodAttentionBackward& g);
void backward(const NeighborhoodAttentionBackward& g, void* workspace, void* stream);

}  // namespace general
}  // namespace hdit
