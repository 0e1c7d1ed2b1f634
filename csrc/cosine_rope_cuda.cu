// Normalises and rotates queries and keys: a group of lanes takes one head of one token, first of q, then of k, with the same
// cosines and sines. Lanes own pairs of features that turn together, so nothing but two sums crosses lanes.
#include "core.cuh"
#include "cosine_rope.h"

namespace hdit {
namespace {

constexpr float kEps = 1e-6f;  // in the lengths of q and k, as in the reference

// A head in units of two chunks of N features: features u·N … and their partners 2·angles further on, and after these the
// features that are not rotated, a chunk of their first half and one of their second. `N` divides 2·angles and dim.
template <int N>
struct Unit {
  int64_t first, second;  // where the chunks begin
  bool turned, has_second;
};

template <int N>
DEVICE Unit<N> unit_at(int64_t u, int64_t angles, int64_t dim) {
  const int64_t pairs = 2 * angles / N;
  if (u < pairs) return {u * N, u * N + 2 * angles, true, true};
  const int64_t rest = (dim - 4 * angles) / N, half = (rest + 1) / 2;  // chunks; neighbouring lanes have neighbouring ones
  const int64_t first = 4 * angles + (u - pairs) * N;
  return {first, first + half * N, false, u - pairs + half < rest};
}

// Feature values of a unit, or cosines and sines of its angles.
template <int N>
struct Two {
  float first[N], second[N];
};

template <int N, class T>
DEVICE Two<N> read(const T* head, const Unit<N>& unit) {
  const Pack<T, N> first = load<N>(head + unit.first);
  Pack<T, N> second = {};
  if (unit.has_second) second = load<N>(head + unit.second);
  Two<N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.first[i] = core::to_float(first.lane[i]), x.second[i] = core::to_float(second.lane[i]);
  return x;
}

template <int N, class T>
DEVICE void write(T* head, const Unit<N>& unit, const Two<N>& x) {
  Pack<T, N> first, second;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    core::from_float(first.lane[i], x.first[i]);
    core::from_float(second.lane[i], x.second[i]);
  }
  store<N>(head + unit.first, first);
  if (unit.has_second) store<N>(head + unit.second, second);
}

// Cosine and sine of the angle of pair i of a head.
DEVICE void turn_of(const CosineRope& args, int64_t y, int64_t x, int64_t head, int64_t i, float& cosine, float& sine) {
  const bool down = i < args.angles;
  const int64_t at = ((down ? y : x) * args.heads + head) * args.angles + (down ? i : i - args.angles);
  const void* table = down ? args.height_angles : args.width_angles;
  if (args.angles_dtype == DType::float64)
    core::sincos(core::load_global<double>(static_cast<const double*>(table) + at), cosine, sine);
  else
    core::sincos(core::load_global<float>(static_cast<const float*>(table) + at), cosine, sine);
}

template <int N>
DEVICE Two<N> turns_of(const CosineRope& args, int64_t y, int64_t x, int64_t head, const Unit<N>& unit) {
  Two<N> turns;  // (cosines, sines)
#pragma unroll
  for (int i = 0; i < N; ++i) {
    turns.first[i] = 1.0f, turns.second[i] = 0.0f;
    if (unit.turned) turn_of(args, y, x, head, unit.first + i, turns.first[i], turns.second[i]);
  }
  return turns;
}

// x turned by the angles, or back by them, times factor.
template <int N>
DEVICE Two<N> turned(const Two<N>& x, const Two<N>& turns, const Unit<N>& unit, bool back, float factor) {
  Two<N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float cosine = turns.first[i] * factor, sine = (back ? -turns.second[i] : turns.second[i]) * factor;
    y.first[i] = unit.turned ? x.first[i] * cosine - x.second[i] * sine : x.first[i] * factor;
    y.second[i] = unit.turned ? x.second[i] * cosine + x.first[i] * sine : x.second[i] * factor;
  }
  return y;
}

// What a group of `width` lanes works on. Its steps keep its head: their size is a multiple of the number of heads.
struct Items {
  int64_t first, step, count, units;
  int lane, width;
};

DEVICE Items items_of(const CosineRope& args, int chunk, int width) {
  const int groups = kBlock / width, angles = int(args.angles), rest = int(args.dim) - 4 * angles;
  return {int64_t(blockIdx.x) * groups + threadIdx.x / width, int64_t(gridDim.x) * groups,
          args.batch * args.height * args.width * args.heads, 2 * angles / chunk + (rest / chunk + 1) / 2,
          int(threadIdx.x % width), width};
}


// One head of one token: where it is, its scale and, held in registers, the turns of the lane's unit.
template <int N>
struct At {
  int64_t item, b, y, x, head;
  bool inside;  // there is such a head
  float scale;
  Two<N> turns;
};

// In 32 bits: a division of 64 is a call, around which registers are spilled.
template <int N, bool kHeld>
DEVICE At<N> head_at(const CosineRope& args, const Items& items, int64_t item) {
  const bool inside = item < items.count;
  const uint32_t heads = uint32_t(args.heads), width = uint32_t(args.width), height = uint32_t(args.height);
  const uint32_t place = inside ? uint32_t(item) : 0u, token = place / heads, row = token / width;
  At<N> at = {item, row / height, row % height, token % width, place % heads, inside, 0.0f, {}};
  if (kHeld && inside && items.lane < items.units)
    at.turns = turns_of<N>(args, at.y, at.x, at.head, unit_at<N>(items.lane, args.angles, args.dim));
  if (inside) at.scale = core::load_global<float>(static_cast<const float*>(args.cosine_scale) + at.head);
  return at;
}

template <class T, int N>
DEVICE T* head_of(const Tokens& x, const At<N>& at) {
  return static_cast<T*>(x.data) + at.b * x.batch_stride + at.y * x.height_stride + at.x * x.width_stride +
         at.head * x.head_stride;
}

// kHeld: a lane has one unit and keeps it in registers; otherwise it reads its units twice.
template <class T, int N, bool kHeld>
DEVICE void forward_head(const CosineRope& args, const Items& items, const At<N>& at, const T* from, T* to, float factor) {
  Two<N> values = {};
  float squares[1] = {0};
  for (int64_t u = items.lane; at.inside && u < items.units; u += items.width) {
    values = read<N>(from, unit_at<N>(u, args.angles, args.dim));
#pragma unroll
    for (int i = 0; i < N; ++i) squares[0] += values.first[i] * values.first[i] + values.second[i] * values.second[i];
  }
  sum_over_group(squares, items.width, 0);
  for (int64_t u = items.lane; at.inside && u < items.units; u += items.width) {
    const Unit<N> unit = unit_at<N>(u, args.angles, args.dim);
    if (!kHeld) values = read<N>(from, unit);
    const Two<N> turns = kHeld ? at.turns : turns_of<N>(args, at.y, at.x, at.head, unit);
    write<N>(to, unit, turned(values, turns, unit, false, factor * core::inverse_root(squares[0] + kEps)));
  }
}

template <class T, int N, bool kHeld>
__global__ void __launch_bounds__(kBlock, 2) cosine_rope_forward_kernel(CosineRopeForward args, int width) {
  const CosineRope& in = args.inputs;
  const Items items = items_of(in, N, width);
  for (int64_t round = 0; round < items.count; round += items.step) {  // all threads of a block go on together
    const At<N> at = head_at<N, kHeld>(in, items, items.first + round);
    const int64_t to = at.item * in.dim;
    forward_head<T, N, kHeld>(in, items, at, head_of<T>(in.q, at), static_cast<T*>(args.q_prepared) + to, at.scale);
    forward_head<T, N, kHeld>(in, items, at, head_of<T>(in.k, at), static_cast<T*>(args.k_prepared) + to, 1.0f);
  }
}

// With n = rsqrt(Σx² + ε), h the gradient turned back: dx = factor·n·(h − x·n²·Σxh), and the scale's gradient is n·Σxh.
template <class T, int N, bool kHeld>
DEVICE float backward_head(const CosineRope& args, const Items& items, const At<N>& at, const T* from, const T* gradient,
                           T* to, float factor) {
  Two<N> values = {}, changes = {};
  float sums[2] = {0, 0};
  const auto take = [&](const Unit<N>& unit) {
    values = read<N>(from, unit);
    const Two<N> turns = kHeld ? at.turns : turns_of<N>(args, at.y, at.x, at.head, unit);
    changes = turned(read<N>(gradient, unit), turns, unit, true, 1.0f);
  };
  for (int64_t u = items.lane; at.inside && u < items.units; u += items.width) {
    take(unit_at<N>(u, args.angles, args.dim));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0] += values.first[i] * values.first[i] + values.second[i] * values.second[i];
      sums[1] += values.first[i] * changes.first[i] + values.second[i] * changes.second[i];
    }
  }
  sum_over_group(sums, items.width, 0);
  const float n = core::inverse_root(sums[0] + kEps), along = n * n * sums[1];
  for (int64_t u = items.lane; to != nullptr && at.inside && u < items.units; u += items.width) {
    const Unit<N> unit = unit_at<N>(u, args.angles, args.dim);
    if (!kHeld) take(unit);
    Two<N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.first[i] = factor * n * (changes.first[i] - values.first[i] * along);
      result.second[i] = factor * n * (changes.second[i] - values.second[i] * along);
    }
    write<N>(to, unit, result);
  }
  return n * sums[1];
}

// sums: of each group, its part of the gradient of its head's scale; or null.
template <class T, int N, bool kHeld>
__global__ void __launch_bounds__(kBlock, 2) cosine_rope_backward_kernel(CosineRopeBackward args, float* sums, int width) {
  const CosineRope& in = args.inputs;
  const Items items = items_of(in, N, width);
  T *const dq = static_cast<T*>(args.dq), *const dk = static_cast<T*>(args.dk);
  float dscale = 0;
  for (int64_t round = 0; round < items.count; round += items.step) {
    const At<N> at = head_at<N, kHeld>(in, items, items.first + round);
    const int64_t to = at.item * in.dim;
    if (dq != nullptr || sums != nullptr) {
      const float part = backward_head<T, N, kHeld>(in, items, at, head_of<T>(in.q, at), head_of<T>(args.dq_prepared, at),
                                                    dq == nullptr ? dq : dq + to, at.scale);
      dscale += at.inside ? part : 0.0f;
    }
    if (dk != nullptr)
      backward_head<T, N, kHeld>(in, items, at, head_of<T>(in.k, at), head_of<T>(args.dk_prepared, at), dk + to, 1.0f);
  }
  if (sums != nullptr && items.lane == 0) core::store_global(sums + items.first, dscale);
}

// dcosine_scale (heads,) from the sums of `groups` groups, whose heads follow each other. A block per head.
__global__ void __launch_bounds__(kBlock)
    cosine_rope_dscale_kernel(const float* sums, float* dcosine_scale, int64_t groups, int64_t heads) {
  float sum[1] = {0};
  for (int64_t group = blockIdx.x + threadIdx.x * heads; group < groups; group += kBlock * heads)
    sum[0] += core::load_global<float>(sums + group);
  sum_over_group(sum, kBlock, core::dynamic_shared());
  if (threadIdx.x == 0) core::store_global(dcosine_scale + blockIdx.x, sum[0]);
}

// ---- launches --------------------------------------------------------------------------------------------------------------
int64_t items(const CosineRope& args) { return args.batch * args.height * args.width * args.heads; }

// Blocks whose groups together step over whole tokens; at most about 4096. It depends on the shape alone, and so do sums.
int64_t blocks_for(const CosineRope& args, int width) {
  const int64_t groups = kBlock / width;
  int64_t common = groups, other = args.heads;
  while (other != 0) {
    const int64_t rest = common % other;
    common = other, other = rest;
  }
  const int64_t multiple = args.heads / common, wanted = ceil_div(items(args), groups);
  return ceil_div(wanted < 4096 ? wanted : 4096, multiple) * multiple;
}

template <int N>
bool accessible(const Tokens& x) {
  return x.data == nullptr || (aligned(x.data) && x.batch_stride % N == 0 && x.height_stride % N == 0 &&
                               x.width_stride % N == 0 && x.head_stride % N == 0);
}

template <class T>
bool wide(const CosineRope& args) {
  constexpr int N = kWide<T>;
  return 2 * args.angles % N == 0 && args.dim % N == 0 && accessible<N>(args.q) && accessible<N>(args.k);
}

// body(N, held, width) as constants and a number: elements of a chunk, whether a lane has one unit, lanes of a group. Heads of
// more than 32 wide units (512 features of 16 bits) are read element by element.
template <int kWideChunk, class Body>
void with_units(const CosineRope& args, bool wide, Body body) {
  const auto count = [&](int64_t chunk) { return 2 * args.angles / chunk + ceil_div((args.dim - 4 * args.angles) / chunk, 2); };
  wide = wide && count(kWideChunk) <= 32;
  const int64_t units = count(wide ? kWideChunk : 1);
  int width = 1;
  while (width < units && width < 32) width *= 2;
  const std::integral_constant<int, kWideChunk> N;
  const std::integral_constant<int, 1> one;
  if (wide) body(N, std::true_type(), width);
  else body(one, std::false_type(), width);
}

// The name of a call and its shape; refuses what 32 bits cannot count.
std::string describe(const char* name, const CosineRope& args) {
  std::string text = std::string(name) + " of q (";
  for (const int64_t size : {args.batch, args.height, args.width, args.heads}) text += std::to_string(size) + ", ";
  text += std::to_string(args.dim) + ")";
  if (items(args) >= int64_t(1) << 32) throw std::runtime_error(text + " failed: at most 2^32 - 1 heads of tokens, got more");
  return text;
}

}  // namespace

void cosine_rope_forward_cuda(const CosineRopeForward& args, int device, void* stream) {
  const CosineRope& in = args.inputs;
  if (items(in) == 0 || in.dim == 0) return;
  const std::string call = describe("cosine_rope_forward", in);
  const DeviceGuard guard(device, call);
  with_element_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    const bool all = wide<T>(in) && aligned(args.q_prepared) && aligned(args.k_prepared);
    with_units<kWide<T>>(in, all, [&](auto chunk, auto held, int width) {
      core::launch(call, cosine_rope_forward_kernel<T, decltype(chunk)::value, decltype(held)::value>,
                   unsigned(blocks_for(in, width)), kBlock, 0, stream, args, width);
    });
  });
}

// The most that any width needs.
int64_t cosine_rope_backward_workspace_cuda(const CosineRope& args) {
  int64_t most = 0;
  for (int width = 1; width <= 32; width *= 2) {
    const int64_t groups = blocks_for(args, width) * (kBlock / width);
    most = groups > most ? groups : most;
  }
  return most * int64_t(sizeof(float));
}

void cosine_rope_backward_cuda(const CosineRopeBackward& args, void* workspace, int device, void* stream) {
  const CosineRope& in = args.inputs;
  float* const dscale = static_cast<float*>(args.dcosine_scale);
  if (args.dq == nullptr && args.dk == nullptr && dscale == nullptr) return;
  const std::string call = describe("cosine_rope_backward", in);
  const DeviceGuard guard(device, call);
  if (items(in) == 0 || in.dim == 0) {
    if (dscale != nullptr && in.heads > 0) core::set_to_zero(dscale, in.heads * sizeof(float), stream, call);
    return;
  }
  float* const sums = dscale == nullptr ? nullptr : static_cast<float*>(workspace);
  with_element_type(in.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWide<T>;
    const bool all = wide<T>(in) && aligned(args.dq) && aligned(args.dk) && accessible<N>(args.dq_prepared) &&
                     accessible<N>(args.dk_prepared);
    with_units<N>(in, all, [&](auto chunk, auto held, int width) {
      const int64_t blocks = blocks_for(in, width);
      core::launch(call, cosine_rope_backward_kernel<T, decltype(chunk)::value, decltype(held)::value>, unsigned(blocks),
                   kBlock, 0, stream, args, sums, width);
      if (sums != nullptr)
        core::launch(call, cosine_rope_dscale_kernel, unsigned(in.heads), kBlock, kBlock / 32 * sizeof(float), stream, sums,
                     dscale, blocks * (kBlock / width), in.heads);
    });
  });
}

}  // namespace hdit
