#include "ada_rms_norm.h"
#include "core.cuh"

namespace hdit {
namespace {

// A row that fits is held in registers between the statistic and the result: kPacks accesses of N elements per thread.
constexpr int kPacks = 4;

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

// `width` threads share a row, a block has kBlock / width rows at a time.
template <class T, int N>
__global__ void __launch_bounds__(kBlock) ada_rms_norm_forward_kernel(AdaRmsNormForward args, int width) {
  using C = Compute<T>;
  __shared__ C shared[kBlock / 32];
  const int lane = threadIdx.x % width, row_in_block = threadIdx.x / width, rows_in_block = kBlock / width;
  const int64_t rows = args.batch * args.tokens;
  for (int64_t first = int64_t(blockIdx.x) * rows_in_block; first < rows; first += int64_t(gridDim.x) * rows_in_block) {
    const int64_t row = first + row_in_block;
    const bool valid = row < rows;
    const int64_t sample = row / args.tokens, token = row % args.tokens;
    const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
    Pack<T, N> packs[kPacks];
    C squares[1] = {0};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = int64_t(lane + k * width) * N;
      if (!valid || column >= args.channels) continue;
      packs[k] = load<N>(x + column);
#pragma unroll
      for (int i = 0; i < N; ++i) squares[0] += to_compute(packs[k].lane[i]) * to_compute(packs[k].lane[i]);
    }
    sum_over_group(squares, width, shared);
    const C inverse_rms = inverse_sqrt(squares[0] / C(args.channels) + C(args.eps));
    const C* scale = static_cast<const C*>(args.scale) + sample * args.scale_batch_stride;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = int64_t(lane + k * width) * N;
      if (!valid || column >= args.channels) continue;
      const auto s = load<N>(scale + column);
#pragma unroll
      for (int i = 0; i < N; ++i)
        from_compute(packs[k].lane[i], to_compute(packs[k].lane[i]) * inverse_rms * s.lane[i]);
      store<N>(static_cast<T*>(args.y) + row * args.channels + column, packs[k]);
    }
  }
}

// Any number of channels, any alignment: a block per row, which reads it twice.
template <class T>
__global__ void __launch_bounds__(kBlock) ada_rms_norm_forward_any_kernel(AdaRmsNormForward args) {
  using C = Compute<T>;
  __shared__ C shared[kBlock / 32];
  for (int64_t row = blockIdx.x; row < args.batch * args.tokens; row += gridDim.x) {
    const int64_t sample = row / args.tokens, token = row % args.tokens;
    const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
    const C* scale = static_cast<const C*>(args.scale) + sample * args.scale_batch_stride;
    C squares[1] = {0};
    for (int64_t c = threadIdx.x; c < args.channels; c += kBlock) squares[0] += to_compute(x[c]) * to_compute(x[c]);
    sum_over_group(squares, kBlock, shared);
    const C inverse_rms = inverse_sqrt(squares[0] / C(args.channels) + C(args.eps));
    for (int64_t c = threadIdx.x; c < args.channels; c += kBlock)
      from_compute(static_cast<T*>(args.y)[row * args.channels + c], to_compute(x[c]) * inverse_rms * scale[c]);
  }
}

// dx = r·scale·dy − x·(r³/C)·Σ(dy·scale·x) with r = rsqrt(mean(x²) + eps), and r·dy·x summed over the rows of a unit into
// sums (units, channels). Registers hold x, dy and the sums of a thread's columns.
template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    ada_rms_norm_backward_kernel(AdaRmsNormBackward args, Units units, Compute<T>* sums, int width) {
  using C = Compute<T>;
  extern __shared__ double dynamic_shared[];  // (rows in a block, width·kPacks·N): dscale of each row slot
  C* slots = reinterpret_cast<C*>(dynamic_shared);
  __shared__ C shared[2 * kBlock / 32];
  const int lane = threadIdx.x % width, slot = threadIdx.x / width, rows_in_block = kBlock / width;
  const int64_t n = args.channels;
  for (int64_t unit = blockIdx.x; unit < units.groups * units.per_group; unit += gridDim.x) {
    const int64_t group = unit / units.per_group, begin = unit % units.per_group * units.rows;
    const int64_t end = min(begin + units.rows, units.group_rows);
    C dscale[kPacks][N] = {};
    for (int64_t first = begin; first < end; first += rows_in_block) {
      const bool valid = first + slot < end;
      const int64_t row = group * units.group_rows + first + slot;
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      const T* x_at = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
      const T* dy_at = static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride;
      const C* scale = static_cast<const C*>(args.scale) + sample * args.scale_batch_stride;
      Pack<T, N> x[kPacks], dy[kPacks];
      C totals[2] = {0, 0};  // Σx², Σ dy·scale·x
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = int64_t(lane + k * width) * N;
        if (!valid || column >= n) continue;
        x[k] = load<N>(x_at + column);
        dy[k] = load<N>(dy_at + column);
        const auto s = load<N>(scale + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C v = to_compute(x[k].lane[i]);
          totals[0] += v * v;
          totals[1] += to_compute(dy[k].lane[i]) * s.lane[i] * v;
        }
      }
      sum_over_group(totals, width, shared);
      const C inverse_rms = inverse_sqrt(totals[0] / C(n) + C(args.eps));
      const C along_x = inverse_rms * inverse_rms * totals[1] / C(n);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = int64_t(lane + k * width) * N;
        if (!valid || column >= n) continue;
        const auto s = load<N>(scale + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C v = to_compute(x[k].lane[i]), d = to_compute(dy[k].lane[i]);
          dscale[k][i] += v * d * inverse_rms;
          from_compute(dy[k].lane[i], (d * s.lane[i] - v * along_x) * inverse_rms);
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
      for (int i = 0; i < N; ++i) {
        if (rows_in_block == 1) sums[unit * n + column + i] = dscale[k][i];
        else slots[slot * pitch + column + i] = dscale[k][i];
      }
    }
    if (rows_in_block == 1) continue;
    __syncthreads();
    for (int64_t column = threadIdx.x; column < n; column += kBlock) {
      C sum = 0;
      for (int r = 0; r < rows_in_block; ++r) sum += slots[r * pitch + column];
      sums[unit * n + column] = sum;
    }
    __syncthreads();
  }
}

// Any number of channels, any alignment: a block per unit, which reads each row twice and keeps its sums in memory.
template <class T>
__global__ void __launch_bounds__(kBlock)
    ada_rms_norm_backward_any_kernel(AdaRmsNormBackward args, Units units, Compute<T>* sums) {
  using C = Compute<T>;
  __shared__ C shared[2 * kBlock / 32];
  const int64_t n = args.channels;
  for (int64_t unit = blockIdx.x; unit < units.groups * units.per_group; unit += gridDim.x) {
    const int64_t group = unit / units.per_group, begin = unit % units.per_group * units.rows;
    const int64_t end = min(begin + units.rows, units.group_rows);
    for (int64_t row = group * units.group_rows + begin; row < group * units.group_rows + end; ++row) {
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      const T* x = static_cast<const T*>(args.x) + sample * args.x_batch_stride + token * args.x_token_stride;
      const T* dy = static_cast<const T*>(args.dy) + sample * args.dy_batch_stride + token * args.dy_token_stride;
      const C* scale = static_cast<const C*>(args.scale) + sample * args.scale_batch_stride;
      C totals[2] = {0, 0};
      for (int64_t c = threadIdx.x; c < n; c += kBlock) {
        totals[0] += to_compute(x[c]) * to_compute(x[c]);
        totals[1] += to_compute(dy[c]) * scale[c] * to_compute(x[c]);
      }
      sum_over_group(totals, kBlock, shared);
      const C inverse_rms = inverse_sqrt(totals[0] / C(n) + C(args.eps));
      const C along_x = inverse_rms * inverse_rms * totals[1] / C(n);
      for (int64_t c = threadIdx.x; c < n; c += kBlock) {
        const C v = to_compute(x[c]), d = to_compute(dy[c]);
        if (args.dx != nullptr)
          from_compute(static_cast<T*>(args.dx)[row * n + c], (d * scale[c] - v * along_x) * inverse_rms);
        if (sums != nullptr) {
          const bool start = row == group * units.group_rows + begin;
          sums[unit * n + c] = (start ? C(0) : sums[unit * n + c]) + v * d * inverse_rms;
        }
      }
    }
  }
}

// dscale (groups, channels) = Σ over units of sums (groups, units, channels), in order. 32 columns × 8 slices of units.
template <class C>
__global__ void __launch_bounds__(kBlock)
    ada_rms_norm_dscale_kernel(const C* sums, C* dscale, int64_t groups, int64_t units, int64_t n) {
  constexpr int kSlices = kBlock / 32;
  __shared__ C shared[kSlices][33];
  const int64_t blocks = (n + 31) / 32;
  const int slice = threadIdx.x / 32;
  for (int64_t block = blockIdx.x; block < groups * blocks; block += gridDim.x) {
    const int64_t group = block / blocks, column = block % blocks * 32 + threadIdx.x % 32;
    C sum = 0;
    if (column < n)
      for (int64_t u = slice; u < units; u += kSlices) sum += sums[(group * units + u) * n + column];
    shared[slice][threadIdx.x % 32] = sum;
    __syncthreads();
    if (slice == 0 && column < n) {
      for (int s = 1; s < kSlices; ++s) sum += shared[s][threadIdx.x];
      dscale[group * n + column] = sum;
    }
    __syncthreads();
  }
}

// Threads that share a row, for rows that fit into registers.
template <class T>
int width_for(int64_t channels) {
  return power_of_two(ceil_div(channels, kWide<T> * 2), 8);
}

template <class T>
bool fits(int64_t channels) {
  return channels % kWide<T> == 0 && channels <= int64_t(kBlock) * kPacks * kWide<T>;
}

std::string describe(const char* name, int64_t batch, int64_t tokens, int64_t channels) {
  return std::string(name) + " of x (" + std::to_string(batch) + ", " + std::to_string(tokens) + ", " +
         std::to_string(channels) + ")";
}

template <class T>
void backward(const AdaRmsNormBackward& args, void* workspace, cudaStream_t stream, const std::string& call) {
  using C = Compute<T>;
  constexpr int N = kWide<T>;
  const Units units = units_for(args.batch, args.tokens, args.scale_batch_stride == 0);
  const int64_t n = args.channels, blocks = units.groups * units.per_group;
  C* dscale = static_cast<C*>(args.dscale);
  if (blocks == 0) {  // a sum over no tokens
    if (dscale != nullptr && units.groups > 0)
      check(cudaMemsetAsync(dscale, 0, units.groups * n * sizeof(C), stream), call);
    return;
  }
  C* sums = dscale == nullptr || units.per_group == 1 ? dscale : static_cast<C*>(workspace);
  const bool wide = fits<T>(n) && args.x_batch_stride % N == 0 && args.x_token_stride % N == 0 &&
                    args.dy_batch_stride % N == 0 && args.dy_token_stride % N == 0 && args.scale_batch_stride % N == 0 &&
                    aligned(args.x) && aligned(args.dy) && aligned(args.dx) && aligned(args.scale);
  if (wide) {
    const int width = width_for<T>(n);
    const size_t shared = width == kBlock ? 0 : kBlock * kPacks * N * sizeof(C);
    ada_rms_norm_backward_kernel<T, N><<<grid_for(blocks), kBlock, shared, stream>>>(args, units, sums, width);
  } else {
    ada_rms_norm_backward_any_kernel<T><<<grid_for(blocks), kBlock, 0, stream>>>(args, units, sums);
  }
  check(cudaGetLastError(), call);
  if (sums == dscale) return;
  ada_rms_norm_dscale_kernel<C>
      <<<grid_for(units.groups * ceil_div(n, 32)), kBlock, 0, stream>>>(sums, dscale, units.groups, units.per_group, n);
  check(cudaGetLastError(), call);
}

}  // namespace

void ada_rms_norm_forward_cuda(const AdaRmsNormForward& args, int device, void* stream) {
  const int64_t n = args.channels, rows = args.batch * args.tokens;
  if (rows == 0 || n == 0) return;
  const std::string call = describe("ada_rms_norm_forward", args.batch, args.tokens, n);
  const DeviceGuard guard(device, call);
  const auto queue = static_cast<cudaStream_t>(stream);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWide<T>;
    const bool wide = fits<T>(n) && args.x_batch_stride % N == 0 && args.x_token_stride % N == 0 &&
                      args.scale_batch_stride % N == 0 && aligned(args.x) && aligned(args.y) && aligned(args.scale);
    if (wide) {
      const int width = width_for<T>(n);
      const unsigned grid = grid_for(ceil_div(rows, kBlock / width));
      ada_rms_norm_forward_kernel<T, N><<<grid, kBlock, 0, queue>>>(args, width);
    } else {
      ada_rms_norm_forward_any_kernel<T><<<grid_for(rows), kBlock, 0, queue>>>(args);
    }
  });
  check(cudaGetLastError(), call);
}

void ada_rms_norm_backward_cuda(const AdaRmsNormBackward& args, void* workspace, int device, void* stream) {
  if (args.channels == 0 || (args.dx == nullptr && args.dscale == nullptr)) return;
  const std::string call = describe("ada_rms_norm_backward", args.batch, args.tokens, args.channels);
  const DeviceGuard guard(device, call);
  with_element_type(args.dtype, [&](auto element) {
    backward<decltype(element)>(args, workspace, static_cast<cudaStream_t>(stream), call);
  });
}

int64_t ada_rms_norm_backward_workspace_cuda(int64_t batch, int64_t tokens, int64_t channels, DType dtype) {
  int64_t rows = 0;
  for (const bool shared : {false, true}) {
    const Units units = units_for(batch, tokens, shared);
    const int64_t needed = units.per_group > 1 ? units.groups * units.per_group : 0;
    rows = needed > rows ? needed : rows;
  }
  return rows * channels * int64_t(dtype == DType::float64 ? sizeof(double) : sizeof(float));
}

}  // namespace hdit
