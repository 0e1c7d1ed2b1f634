#include "ada_rms_norm.h"
#include "core.cuh"

namespace hdit {
namespace {

// A row that fits is held in registers between the statistic and the result: kPacks accesses of N elements per thread, two if
// these suffice (more registers leave fewer warps to hide latency), or four.
constexpr int kMostPacks = 4;

// Bytes of shared memory that sums over a row need: two floats of each warp.
constexpr int kSumsBytes = 2 * kBlock / 32 * sizeof(float);

// dscale is a sum over tokens: units of rows are summed apart, then in order. Units depend on the shape alone.
constexpr int64_t kUnits = 2048;
constexpr int64_t kRowsPerUnit = 16;

struct Units {
  int64_t groups;      // rows whose scale is the same vector form a group
  int64_t group_rows;  // rows of a group
  int64_t rows;        // rows of a unit; the last one of a group may have fewer
  int64_t per_group;
};

Units units_for(int64_t batch, int64_t tokens, bool shared) {
  const int64_t groups = shared ? 1 : batch, group_rows = shared ? batch * tokens : tokens;
  int64_t rows = ceil_div(groups * group_rows, kUnits);
  rows = rows < kRowsPerUnit ? kRowsPerUnit : rows;
  return {groups, group_rows, rows, ceil_div(group_rows, rows)};
}

template <class T>
DEVICE float value(const T* x, int64_t at) {
  return core::to_float(core::load_global<T>(x + at));
}

// `width` threads share a row, a block has kBlock / width rows at a time.
template <class T, int N, int kPacks>
__global__ void __launch_bounds__(kBlock) ada_rms_norm_forward_kernel(AdaRmsNormForward args, int width) {
  const uint32_t shared = core::dynamic_shared();
  const int lane = threadIdx.x % width, row_in_block = threadIdx.x / width, rows_in_block = kBlock / width;
  const int64_t rows = args.batch * args.tokens;
  for (int64_t first = int64_t(blockIdx.x) * rows_in_block; first < rows; first += int64_t(gridDim.x) * rows_in_block) {
    const int64_t row = first + row_in_block;
    const bool valid = row < rows;
    const int64_t sample = row / args.tokens, token = row % args.tokens;
    const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
    Pack<T, N> packs[kPacks];
    float squares[1] = {0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = int64_t(lane + k * width) * N;
      if (!valid || column >= args.channels) continue;
      packs[k] = load<N>(x + column);
#pragma unroll
      for (int i = 0; i < N; ++i) squares[0] += core::to_float(packs[k].lane[i]) * core::to_float(packs[k].lane[i]);
    }
    sum_over_group(squares, width, shared);
    const float inverse_rms = core::inverse_root(squares[0] / float(args.channels) + float(args.eps));
    const float* scale = static_cast<const float*>(args.scale) + sample * args.scale_batch_stride;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = int64_t(lane + k * width) * N;
      if (!valid || column >= args.channels) continue;
      const auto s = load<N>(scale + column);
#pragma unroll
      for (int i = 0; i < N; ++i)
        core::from_float(packs[k].lane[i], core::to_float(packs[k].lane[i]) * inverse_rms * s.lane[i]);
      store<N>(static_cast<T*>(args.y) + row * args.channels + column, packs[k]);
    }
  }
}

// Any number of channels, any alignment: a block per row, which reads it twice.
template <class T>
__global__ void __launch_bounds__(kBlock) ada_rms_norm_forward_any_kernel(AdaRmsNormForward args) {
  const uint32_t shared = core::dynamic_shared();
  for (int64_t row = blockIdx.x; row < args.batch * args.tokens; row += gridDim.x) {
    const int64_t sample = row / args.tokens, token = row % args.tokens;
    const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
    const float* scale = static_cast<const float*>(args.scale) + sample * args.scale_batch_stride;
    float squares[1] = {0};
    for (int64_t c = threadIdx.x; c < args.channels; c += kBlock) {
      const float v = value(x, c);
      squares[0] += v * v;
    }
    sum_over_group(squares, kBlock, shared);
    const float inverse_rms = core::inverse_root(squares[0] / float(args.channels) + float(args.eps));
    for (int64_t c = threadIdx.x; c < args.channels; c += kBlock)
      core::store_global(static_cast<T*>(args.y) + row * args.channels + c,
                         core::from_float<T>(value(x, c) * inverse_rms * value(scale, c)));
  }
}

// dx = r·scale·dy − x·(r³/C)·Σ(dy·scale·x) with r = rsqrt(mean(x²) + eps), and r·dy·x summed over the rows of a unit into
// sums (units, channels). Registers hold x, dy and the sums of a thread's columns.
template <class T, int N, int kPacks>
__global__ void __launch_bounds__(kBlock, kPacks == 2 ? 2 : 1)
    ada_rms_norm_backward_kernel(AdaRmsNormBackward args, Units units, float* sums, int width) {
  // (rows in a block, width·kPacks·N): dscale of each row slot
  const uint32_t shared = core::dynamic_shared(), slots = shared + kSumsBytes;
  const int lane = threadIdx.x % width, slot = threadIdx.x / width, rows_in_block = kBlock / width;
  const int64_t n = args.channels;
  for (int64_t unit = blockIdx.x; unit < units.groups * units.per_group; unit += gridDim.x) {
    const int64_t group = unit / units.per_group, begin = unit % units.per_group * units.rows;
    const int64_t end = begin + units.rows < units.group_rows ? begin + units.rows : units.group_rows;
    float dscale[kPacks][N] = {};
    for (int64_t first = begin; first < end; first += rows_in_block) {
      const bool valid = first + slot < end;
      const int64_t row = group * units.group_rows + first + slot;
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      const T* x_at = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
      const T* dy_at = static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride;
      const float* scale = static_cast<const float*>(args.scale) + sample * args.scale_batch_stride;
      Pack<T, N> x[kPacks], dy[kPacks];
      float totals[2] = {0, 0};  // Σx², Σ dy·scale·x
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = int64_t(lane + k * width) * N;
        if (!valid || column >= n) continue;
        x[k] = load<N>(x_at + column);
        dy[k] = load<N>(dy_at + column);
        const auto s = load<N>(scale + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float v = core::to_float(x[k].lane[i]);
          totals[0] += v * v;
          totals[1] += core::to_float(dy[k].lane[i]) * s.lane[i] * v;
        }
      }
      sum_over_group(totals, width, shared);
      const float inverse_rms = core::inverse_root(totals[0] / float(n) + float(args.eps));
      const float along_x = inverse_rms * inverse_rms * totals[1] / float(n);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = int64_t(lane + k * width) * N;
        if (!valid || column >= n) continue;
        const auto s = load<N>(scale + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float v = core::to_float(x[k].lane[i]), d = core::to_float(dy[k].lane[i]);
          dscale[k][i] += v * d * inverse_rms;
          core::from_float(dy[k].lane[i], (d * s.lane[i] - v * along_x) * inverse_rms);
        }
        if (args.dx != nullptr) store<N>(static_cast<T*>(args.dx) + row * n + column, dy[k]);
      }
    }
    if (sums == nullptr) continue;
    // Slots are added in order; a block with one row at a time has nothing to add.
    const int pitch = width * kPacks * N;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = int64_t(lane + k * width) * N;
      if (column >= n) continue;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 four = {dscale[k][i], dscale[k][i + 1], dscale[k][i + 2], dscale[k][i + 3]};
        if (rows_in_block == 1) core::store_global(sums + unit * n + column + i, four);
        else core::store_shared(slots + (slot * pitch + column + i) * 4, four);
      }
    }
    if (rows_in_block == 1) continue;
    core::sync_block();
    for (int64_t column = threadIdx.x; column < n; column += kBlock) {
      float sum = 0;
      for (int r = 0; r < rows_in_block; ++r) sum += core::load_shared<float>(slots + (r * pitch + column) * 4);
      core::store_global(sums + unit * n + column, sum);
    }
    core::sync_block();
  }
}

// Any number of channels, any alignment: a block per unit, which reads each row twice and keeps its sums in memory.
template <class T>
__global__ void __launch_bounds__(kBlock)
    ada_rms_norm_backward_any_kernel(AdaRmsNormBackward args, Units units, float* sums) {
  const uint32_t shared = core::dynamic_shared();
  const int64_t n = args.channels;
  for (int64_t unit = blockIdx.x; unit < units.groups * units.per_group; unit += gridDim.x) {
    const int64_t group = unit / units.per_group, begin = unit % units.per_group * units.rows;
    const int64_t end = begin + units.rows < units.group_rows ? begin + units.rows : units.group_rows;
    for (int64_t row = group * units.group_rows + begin; row < group * units.group_rows + end; ++row) {
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
      const T* dy = static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride;
      const float* scale = static_cast<const float*>(args.scale) + sample * args.scale_batch_stride;
      float totals[2] = {0, 0};
      for (int64_t c = threadIdx.x; c < n; c += kBlock) {
        const float v = value(x, c);
        totals[0] += v * v;
        totals[1] += value(dy, c) * value(scale, c) * v;
      }
      sum_over_group(totals, kBlock, shared);
      const float inverse_rms = core::inverse_root(totals[0] / float(n) + float(args.eps));
      const float along_x = inverse_rms * inverse_rms * totals[1] / float(n);
      for (int64_t c = threadIdx.x; c < n; c += kBlock) {
        const float v = value(x, c), d = value(dy, c);
        if (args.dx != nullptr)
          core::store_global(static_cast<T*>(args.dx) + row * n + c,
                             core::from_float<T>((d * value(scale, c) - v * along_x) * inverse_rms));
        if (sums != nullptr) {
          float* const sum = sums + unit * n + c;
          const float before = row == group * units.group_rows + begin ? 0.0f : core::load_own(sum);
          core::store_global(sum, before + v * d * inverse_rms);
        }
      }
    }
  }
}

// dscale (groups, channels) = Σ over units of sums (groups, units, channels), in order. 32 columns × 8 slices of units.
__global__ void __launch_bounds__(kBlock)
    ada_rms_norm_dscale_kernel(const float* sums, float* dscale, int64_t groups, int64_t units, int64_t n) {
  constexpr int kSlices = kBlock / 32;
  const uint32_t shared = core::dynamic_shared();
  const int64_t blocks = (n + 31) / 32;
  const int slice = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t block = blockIdx.x; block < groups * blocks; block += gridDim.x) {
    const int64_t group = block / blocks, column = block % blocks * 32 + lane;
    float sum = 0;
    if (column < n)
      for (int64_t u = slice; u < units; u += kSlices)
        sum += core::load_global<float>(sums + (group * units + u) * n + column);
    core::store_shared(shared + threadIdx.x * 4, sum);
    core::sync_block();
    if (slice == 0 && column < n) {
      for (int s = 1; s < kSlices; ++s) sum += core::load_shared<float>(shared + (s * 32 + lane) * 4);
      core::store_global(dscale + group * n + column, sum);
    }
    core::sync_block();
  }
}

// body(packs, width) for rows that fit into registers: accesses per thread, as a constant, and threads that share a row.
template <class T, class Body>
void with_packs(int64_t channels, Body body) {
  const int width = power_of_two(ceil_div(channels, kWide<T> * 2), 8);
  if (channels <= int64_t(width) * kWide<T> * 2) body(std::integral_constant<int, 2>(), width);
  else body(std::integral_constant<int, kMostPacks>(), width);
}

template <class T>
bool fits(int64_t channels) {
  return channels % kWide<T> == 0 && channels <= int64_t(kBlock) * kMostPacks * kWide<T>;
}

std::string describe(const char* name, int64_t batch, int64_t tokens, int64_t channels) {
  return std::string(name) + " of x (" + std::to_string(batch) + ", " + std::to_string(tokens) + ", " +
         std::to_string(channels) + ")";
}

template <class T>
void backward(const AdaRmsNormBackward& args, void* workspace, void* stream, const std::string& call) {
  constexpr int N = kWide<T>;
  const Units units = units_for(args.batch, args.tokens, args.scale_batch_stride == 0);
  const int64_t n = args.channels, blocks = units.groups * units.per_group;
  float* dscale = static_cast<float*>(args.dscale);
  if (blocks == 0) {  // a sum over no tokens
    if (dscale != nullptr && units.groups > 0) core::set_to_zero(dscale, units.groups * n * sizeof(float), stream, call);
    return;
  }
  float* sums = dscale == nullptr || units.per_group == 1 ? dscale : static_cast<float*>(workspace);
  const bool wide = fits<T>(n) && args.x_batch_stride % N == 0 && args.x_token_stride % N == 0 &&
                    args.dy_batch_stride % N == 0 && args.dy_token_stride % N == 0 && args.scale_batch_stride % N == 0 &&
                    aligned(args.x) && aligned(args.dy) && aligned(args.dx) && aligned(args.scale);
  if (wide) {
    with_packs<T>(n, [&](auto packs, int width) {
      constexpr int kPacks = decltype(packs)::value;
      const size_t slots = width == kBlock ? 0 : kBlock * kPacks * N * sizeof(float);
      core::launch(call, ada_rms_norm_backward_kernel<T, N, kPacks>, grid_for(blocks), kBlock, kSumsBytes + slots, stream,
                   args, units, sums, width);
    });
  } else {
    core::launch(call, ada_rms_norm_backward_any_kernel<T>, grid_for(blocks), kBlock, kSumsBytes, stream, args, units, sums);
  }
  if (sums == dscale) return;
  core::launch(call, ada_rms_norm_dscale_kernel, grid_for(units.groups * ceil_div(n, 32)), kBlock, kBlock * sizeof(float),
               stream, sums, dscale, units.groups, units.per_group, n);
}

}  // namespace

void ada_rms_norm_forward_cuda(const AdaRmsNormForward& args, int device, void* stream) {
  const int64_t n = args.channels, rows = args.batch * args.tokens;
  if (rows == 0 || n == 0) return;
  const std::string call = describe("ada_rms_norm_forward", args.batch, args.tokens, n);
  const DeviceGuard guard(device, call);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWide<T>;
    const bool wide = fits<T>(n) && args.x_batch_stride % N == 0 && args.x_token_stride % N == 0 &&
                      args.scale_batch_stride % N == 0 && aligned(args.x) && aligned(args.y) && aligned(args.scale);
    if (wide) {
      with_packs<T>(n, [&](auto packs, int width) {
        core::launch(call, ada_rms_norm_forward_kernel<T, N, decltype(packs)::value>,
                     grid_for(ceil_div(rows, kBlock / width)), kBlock, kSumsBytes, stream, args, width);
      });
    } else {
      core::launch(call, ada_rms_norm_forward_any_kernel<T>, grid_for(rows), kBlock, kSumsBytes, stream, args);
    }
  });
}

void ada_rms_norm_backward_cuda(const AdaRmsNormBackward& args, void* workspace, int device, void* stream) {
  if (args.channels == 0 || (args.dx == nullptr && args.dscale == nullptr)) return;
  const std::string call = describe("ada_rms_norm_backward", args.batch, args.tokens, args.channels);
  const DeviceGuard guard(device, call);
  with_element_type(args.dtype,
                    [&](auto element) { backward<decltype(element)>(args, workspace, stream, call); });
}

int64_t ada_rms_norm_backward_workspace_cuda(int64_t batch, int64_t tokens, int64_t channels) {
  int64_t rows = 0;
  for (const bool shared : {false, true}) {
    const Units units = units_for(batch, tokens, shared);
    const int64_t needed = units.per_group > 1 ? units.groups * units.per_group : 0;
    rows = needed > rows ? needed : rows;
  }
  return rows * channels * int64_t(sizeof(float));
}

}  // namespace hdit
