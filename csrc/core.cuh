// What every CUDA kernel stands on: element types, accesses of up to 16 bytes, sums over groups of threads, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "core.h"

namespace hdit {

// Kernels run in blocks of this many threads.
constexpr int kBlock = 256;

// ---- element types ---------------------------------------------------------------------------------------------------
// Arithmetic is in float32, for float64 elements in float64.
template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

__device__ inline float to_compute(float v) { return v; }
__device__ inline double to_compute(double v) { return v; }
__device__ inline float to_compute(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_compute(__half v) { return __half2float(v); }

__device__ inline void from_compute(float& to, float v) { to = v; }
__device__ inline void from_compute(double& to, double v) { to = v; }
__device__ inline void from_compute(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ inline void from_compute(__half& to, float v) { to = __float2half_rn(v); }

__device__ inline float inverse_sqrt(float v) { return rsqrtf(v); }
__device__ inline double inverse_sqrt(double v) { return rsqrt(v); }

// body(T{}) with the element type of `dtype`.
template <class Body>
void with_element_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(__nv_bfloat16{});
    case DType::float16:
      return body(__half{});
    case DType::float64:
      return body(double{});
  }
}

// ---- loads and stores ------------------------------------------------------------------------------------------------
// N neighbouring elements, aligned to their size: one access where that is at most 16 bytes, several where it is more.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T lane[N];
};

template <int N, class T>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ inline void store(T* p, const Pack<T, N>& v) {
  *reinterpret_cast<Pack<T, N>*>(p) = v;
}

// Elements of one 16-byte access.
template <class T>
constexpr int kWide = 16 / sizeof(T);

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- sums ------------------------------------------------------------------------------------------------------------
// Sums over groups of `width` neighbouring threads (a power of two, at most kBlock), in a fixed order; every thread gets
// its group's. All threads of the block must call. `shared` holds kSums·kBlock/32 numbers when width > 32.
template <int kSums, class V>
__device__ inline void sum_over_group(V (&v)[kSums], int width, V* shared) {
  for (int step = min(width, 32) / 2; step > 0; step /= 2)
#pragma unroll
    for (int s = 0; s < kSums; ++s) v[s] += __shfl_xor_sync(0xffffffffu, v[s], step);
  if (width <= 32) return;
  const int warp = threadIdx.x / 32, warps = width / 32;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int s = 0; s < kSums; ++s) shared[s * (kBlock / 32) + warp] = v[s];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    v[s] = 0;
    for (int w = warp / warps * warps, end = w + warps; w < end; ++w) v[s] += shared[s * (kBlock / 32) + w];
  }
  __syncthreads();  // before the next call writes `shared`
}

// ---- host side -------------------------------------------------------------------------------------------------------
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two in [low, kBlock] that is at least `value`, or kBlock.
inline int power_of_two(int64_t value, int low) {
  int result = low;
  while (result < value && result < kBlock) result *= 2;
  return result;
}

// Blocks for `work` units over which the kernel strides.
inline unsigned grid_for(int64_t work) { return unsigned(work < (int64_t(1) << 30) ? work : int64_t(1) << 30); }

// Throws a sentence that names the call when a CUDA function or a launch has failed.
inline void check(cudaError_t status, const std::string& call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(call + " failed: " + cudaGetErrorName(status) + " (" + std::to_string(int(status)) +
                           "), " + cudaGetErrorString(status));
}

// Makes a device current and restores the one before. This library's CUDA runtime is its own, linked statically, and need
// not agree with another one in the process about the current device.
class DeviceGuard {
 public:
  DeviceGuard(int device, const std::string& call) {
    check(cudaGetDevice(&previous_), call);
    if (previous_ != device) check(cudaSetDevice(device), call);
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace hdit
