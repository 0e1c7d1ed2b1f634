#include "core.cuh"
#include "geglu.h"

namespace hdit {
namespace {

constexpr float kHalfLog2e = -0.72134752f;  // exp(−a²/2) = exp2(a²·this)

// Φ(g) from Φ(−a) = exp(−a²/2)·t·P(t), t = 1/(1 + 0.34375·a): P is a minimax fit of relative error 2e-8 for 0 <= a <= 13.3.
// From there on Φ(−a) is below the smallest normal number and taken for 0. The tail keeps its digits, where (1 + erf)/2 would
// cancel.
DEVICE float normal_cdf(float g) {
  constexpr float kTailEnd = 13.28f;
  const float a = fabsf(g);
  const float t = core::reciprocal(1.0f + 0.34375f * a);
  float p = t * -0.02814844250679016f + 0.14540769159793854f;
  p = p * t + -0.2747459411621094f;
  p = p * t + 0.19417200982570648f;
  p = p * t + -0.041402190923690796f;
  p = p * t + 0.11348625272512436f;
  p = p * t + 0.11654485017061234f;
  p = p * t + 0.1375674456357956f;
  p = p * t + 0.13711832463741302f;
  const float tail = a >= kTailEnd ? 0.0f : core::exp2(a * a * kHalfLog2e) * t * p;  // NaN is not the end
  return g < 0.0f ? tail : 1.0f - tail;
}

// φ(g)
DEVICE float normal_density(float g) { return core::exp2(g * g * kHalfLog2e) * 0.3989422804f; }

// A block covers blockDim.y rows with blockDim.x threads each; blockIdx.y shares out the columns of long rows. N elements
// an access: 16 bytes where every row allows it, else one element.
template <class T, int N>
__global__ void __launch_bounds__(kBlock) geglu_forward_kernel(GegluForward args) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < args.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    for (int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N; column < args.n;
         column += int64_t(gridDim.y) * blockDim.x * N) {
      const T* value_at = x + row * args.x_row_stride + column;
      const auto value = load<N>(value_at), gate = load<N>(value_at + args.n);
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float g = core::to_float(gate.lane[i]);
        core::from_float(out.lane[i], core::to_float(value.lane[i]) * (g * normal_cdf(g)));
      }
      store<N>(y + row * args.n + column, out);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock) geglu_backward_kernel(GegluBackward args) {
  const T* x = static_cast<const T*>(args.x);
  const T* dy = static_cast<const T*>(args.dy);
  T* dx = static_cast<T*>(args.dx);
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < args.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    for (int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N; column < args.n;
         column += int64_t(gridDim.y) * blockDim.x * N) {
      const T* value_at = x + row * args.x_row_stride + column;
      const auto value = load<N>(value_at), gate = load<N>(value_at + args.n);
      const auto gradient = load<N>(dy + row * args.dy_row_stride + column);
      Pack<T, N> dvalue, dgate;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float g = core::to_float(gate.lane[i]), d = core::to_float(gradient.lane[i]);
        const float cdf = normal_cdf(g);
        core::from_float(dvalue.lane[i], d * (g * cdf));
        core::from_float(dgate.lane[i], d * core::to_float(value.lane[i]) * (cdf + g * normal_density(g)));
      }
      store<N>(dx + row * 2 * args.n + column, dvalue);
      store<N>(dx + row * 2 * args.n + args.n + column, dgate);
    }
  }
}

struct Launch {
  dim3 grid, block;
};

// `accesses` is the number of threads that a row can occupy.
Launch launch_for(int64_t rows, int64_t accesses) {
  // As many threads along a row as leave at most an eighth of them idle, and at least half a warp.
  int along = power_of_two(accesses, 16);
  while (along > 16 && ceil_div(accesses, along) * along > accesses + accesses / 8) along /= 2;
  const int64_t pieces = ceil_div(accesses, int64_t(along) * 4);
  return {dim3(grid_for(ceil_div(rows, kBlock / along)), unsigned(pieces < 65535 ? pieces : 65535)),
          dim3(along, kBlock / along)};
}

std::string describe(const char* name, int64_t rows, int64_t n) {
  return std::string(name) + " of x (" + std::to_string(rows) + ", " + std::to_string(2 * n) + ")";
}

}  // namespace

void geglu_forward_cuda(const GegluForward& args, int device, void* stream) {
  if (args.rows == 0 || args.n == 0) return;
  const std::string call = describe("geglu_forward", args.rows, args.n);
  const DeviceGuard guard(device, call);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWide<T>;
    const bool wide = args.n % N == 0 && args.x_row_stride % N == 0 && aligned(args.x) && aligned(args.y);
    const Launch launch = launch_for(args.rows, wide ? args.n / N : args.n);
    const auto kernel = wide ? geglu_forward_kernel<T, N> : geglu_forward_kernel<T, 1>;
    core::launch(call, kernel, launch.grid, launch.block, 0, stream, args);
  });
}

void geglu_backward_cuda(const GegluBackward& args, int device, void* stream) {
  if (args.rows == 0 || args.n == 0) return;
  const std::string call = describe("geglu_backward", args.rows, args.n);
  const DeviceGuard guard(device, call);
  with_element_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWide<T>;
    const bool wide = args.n % N == 0 && args.x_row_stride % N == 0 && args.dy_row_stride % N == 0 && aligned(args.x) &&
                      aligned(args.dy) && aligned(args.dx);
    const Launch launch = launch_for(args.rows, wide ? args.n / N : args.n);
    const auto kernel = wide ? geglu_backward_kernel<T, N> : geglu_backward_kernel<T, 1>;
    core::launch(call, kernel, launch.grid, launch.block, 0, stream, args);
  });
}

}  // namespace hdit
