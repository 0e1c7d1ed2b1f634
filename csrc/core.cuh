// What every CUDA kernel stands on: thin device primitives, element types, sums over groups of threads, launches.
//
// Kernels use these primitives, threadIdx / blockIdx / blockDim / gridDim and plain C++, and nothing else of CUDA. So the
// same .cu file has two lives: under nvcc a primitive is the instruction; under the host compiler (HDIT_EMULATION) it is
// what the instruction does, checked and counted (emulated_primitives.h, emulation.h), and tests run every kernel without a GPU.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core.h"

#if defined(HDIT_EMULATION)
#include "emulated_primitives.h"
#define DEVICE inline
// A function that calls primitives for others: counts and errors name the line that called it.
#define CALLED_FROM , core::Place place = core::Place::here()
#define FROM_CALLER , place
#else
#define CALLED_FROM
#define FROM_CALLER
#include <cuda_runtime.h>
#define DEVICE __device__ __forceinline__

namespace hdit {
namespace core {

// ---- registers ---------------------------------------------------------------------------------------------------------
DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
// The same value, in a register of its own: keeps the compiler from moving or merging what made it.
DEVICE float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- functions: approximations of the special function unit --------------------------------------------------------------
#define HDIT_UNARY(name, instruction)                                \
  DEVICE float name(float x) {                                       \
    float y;                                                         \
    asm(instruction ".ftz.f32 %0, %1;" : "=f"(y) : "f"(x));          \
    return y;                                                        \
  }
HDIT_UNARY(exp2, "ex2.approx")
HDIT_UNARY(log2, "lg2.approx")
HDIT_UNARY(rsqrt, "rsqrt.approx")
HDIT_UNARY(reciprocal, "rcp.approx")
HDIT_UNARY(sin_fast, "sin.approx")  // for |x| <= π
HDIT_UNARY(cos_fast, "cos.approx")
#undef HDIT_UNARY

// ---- 16-bit formats ------------------------------------------------------------------------------------------------------
DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE float f16_low(uint32_t pair) {
  float y;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(pair));
  return y;
}
DEVICE float f16_high(uint32_t pair) {
  float y;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(pair));
  return y;
}

// Of pairs: the larger of a and |b|, or the one that is not NaN.
DEVICE uint32_t max_magnitude_f16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .b32 m; abs.f16x2 m, %2; max.f16x2 %0, %1, m;}" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE uint32_t max_magnitude_bf16(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .b32 m; abs.bf16x2 m, %2; max.bf16x2 %0, %1, m;}" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// ---- the threads of a warp and of a block ----------------------------------------------------------------------------------
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE int uniform(int x) { return __shfl_sync(~0u, x, 0); }  // x is the same in all lanes: tells the compiler
DEVICE bool any(bool x) { return __any_sync(~0u, x); }  // of the warp
DEVICE uint32_t max_of_warp(uint32_t x) { return __reduce_max_sync(~0u, x); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// ---- products of a warp: d = c + a·b, or d += a·b --------------------------------------------------------------------------
// 16-bit: a 16×16, b 16×8, c and d 16×8 in float32; fragments as in the PTX manual, mma.m16n8k16.
#define HDIT_MMA(name, shape_and_types)                                                                                 \
  DEVICE void name(float(&d)[4], const float(&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,   \
                   uint32_t b1) {                                                                                       \
    asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                                \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));            \
  }                                                                                                                     \
  DEVICE void name(float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {        \
    asm("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                        \
  }
HDIT_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
HDIT_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
HDIT_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")  // a 16×8, b 8×8
#undef HDIT_MMA

// Four 8×8 matrices of 16-bit elements; lane 8m + i gives the address of row i of matrix m.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// ---- memory ----------------------------------------------------------------------------------------------------------------
// Shared memory is the launch's, addressed by 32 bits.
DEVICE uint32_t dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return uint32_t(__cvta_generic_to_shared(bytes));
}
template <class T>
DEVICE T load_shared(uint32_t at) {
  return *static_cast<const T*>(__cvta_shared_to_generic(at));
}
template <class T>
DEVICE void store_shared(uint32_t at, T x) {
  *static_cast<T*>(__cvta_shared_to_generic(at)) = x;
}
// What no thread of this launch writes.
template <class T>
DEVICE T load_global(const void* p) {
  static_assert(sizeof(T) <= 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one access");
  T x;
  const auto take = [&](auto bits) { __builtin_memcpy(&x, &bits, sizeof(T)); };
  if constexpr (sizeof(T) == 16) take(__ldg(static_cast<const uint4*>(p)));
  else if constexpr (sizeof(T) == 8) take(__ldg(static_cast<const uint2*>(p)));
  else if constexpr (sizeof(T) == 4) take(__ldg(static_cast<const unsigned*>(p)));
  else if constexpr (sizeof(T) == 2) take(__ldg(static_cast<const unsigned short*>(p)));
  else take(__ldg(static_cast<const unsigned char*>(p)));
  return x;
}
// What this thread itself has written.
template <class T>
DEVICE T load_own(const T* p) {
  return *p;
}
template <class T>
DEVICE void store_global(void* p, T x) {
  __builtin_assume(__isGlobal(p));  // of a pointer from shared memory the compiler does not know
  *static_cast<T*>(p) = x;
}

// Asynchronous copies from global to shared memory: started, committed as a group, there for the thread that waited and, after
// a barrier, for others.
DEVICE void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void copy_async_4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` groups of this thread are still on their way.
template <int left>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

}  // namespace core
}  // namespace hdit
#endif

namespace hdit {
namespace core {

// 1/sqrt(x) within a unit in the last place: rsqrt and a Newton step.
DEVICE float inverse_root(float x) {
  const float y = rsqrt(x);
  return y * fmaf(-0.5f * x * y, y, 1.5f);
}

// ---- cos and sin -----------------------------------------------------------------------------------------------------------
// Within 2 units in the last place or, next to a zero, 5e-11: x = n·π/2 + r, polynomials in r, and the quadrant chooses. The
// parts of π/2 have few bits, so that their products with n are exact. Far angles lose whole turns in double precision first.
DEVICE void sincos_near(float x, float& cosine, float& sine) {
  const float rounder = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, in the low bits
  const float shifted = fmaf(x, 0.636619772f, rounder), n = shifted - rounder;
  const float r = fmaf(n, -7.549790126404332e-8f, fmaf(n, -4.837512969970703125e-4f, fmaf(n, -1.5703125f, x))), z = r * r;
  const float sin_r = fmaf(r * z, fmaf(fmaf(z, -1.9514957e-4f, 8.332158e-3f), z, -0.16666655f), r);
  const float cos_r = fmaf(z * z, fmaf(fmaf(z, 2.4432784e-5f, -1.3887313e-3f), z, 0.041666646f), fmaf(z, -0.5f, 1.0f));
  const uint32_t quadrant = as_bits(shifted);
  cosine = as_float(as_bits(quadrant & 1 ? sin_r : cos_r) ^ ((quadrant + 1) & 2) << 30);
  sine = as_float(as_bits(quadrant & 1 ? cos_r : sin_r) ^ (quadrant & 2) << 30);
}
DEVICE void sincos(double x, float& cosine, float& sine) {
  const double turns = rint(x * 0.15915494309189533577);
  sincos_near(float(fma(turns, -2.4492935982947064e-16, fma(turns, -6.283185307179586, x))), cosine, sine);
}
DEVICE void sincos(float x, float& cosine, float& sine) {
  if (fabsf(x) < 8192.0f) sincos_near(x, cosine, sine);
  else sincos(double(x), cosine, sine);
}

// ---- element types: arithmetic is in float32 -----------------------------------------------------------------------------
DEVICE float bf16_low(uint32_t pair) { return as_float(pair << 16); }
DEVICE float bf16_high(uint32_t pair) { return as_float(pair & 0xffff0000u); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(Float16 x) { return f16_low(x.bits); }

// Rounded to nearest even.
DEVICE void from_float(float& to, float x) { to = x; }
DEVICE void from_float(BFloat16& to, float x) { to.bits = uint16_t(pack_bf16(x, 0.0f)); }
DEVICE void from_float(Float16& to, float x) { to.bits = uint16_t(pack_f16(x, 0.0f)); }
template <class T>
DEVICE T from_float(float x) {
  T result;
  from_float(result, x);
  return result;
}

}  // namespace core

// body(T{}) with the element type of `dtype`. These kernels decline float64 (hdit_kernels/extension.py).
template <class Body>
void with_element_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::bfloat16:
      return body(BFloat16{});
    case DType::float16:
      return body(Float16{});
    case DType::float64:
      throw std::runtime_error("the CUDA kernels compute in float32: float64 tensors are not for them");
  }
}

// ---- accesses of several elements --------------------------------------------------------------------------------------------
// N neighbouring elements, aligned to their size: one access where that is at most 16 bytes, several where it is more.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T lane[N];
};

template <class T, int N>
struct Sixteenths {  // as accesses of at most 16 bytes
  static constexpr int kAccesses = sizeof(T) * N > 16 ? sizeof(T) * N / 16 : 1;
  Pack<T, N / kAccesses> part[kAccesses];
};

template <int N, class T>
DEVICE Pack<T, N> load(const T* p CALLED_FROM) {
  using Parts = Sixteenths<T, N>;
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < Parts::kAccesses; ++i) {
    constexpr int kEach = N / Parts::kAccesses;
    const auto part = core::load_global<Pack<T, kEach>>(p + i * kEach FROM_CALLER);
#pragma unroll
    for (int j = 0; j < kEach; ++j) result.lane[i * kEach + j] = part.lane[j];
  }
  return result;
}

template <int N, class T>
DEVICE void store(T* p, const Pack<T, N>& v CALLED_FROM) {
  static_assert(sizeof(v) <= 16);
  core::store_global(p, v FROM_CALLER);
}

// Elements of one 16-byte access.
template <class T>
constexpr int kWide = 16 / sizeof(T);

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// ---- sums ------------------------------------------------------------------------------------------------------------
// Elementwise kernels run in blocks of this many threads.
constexpr int kBlock = 256;

// Sums over groups of `width` neighbouring threads (a power of two, at most kBlock), in a fixed order; every thread gets
// its group's. All threads of the block must call. At `shared` there are kSums·kBlock/32 floats when width > 32.
template <int kSums>
DEVICE void sum_over_group(float (&v)[kSums], int width, uint32_t shared) {
  for (int step = (width < 32 ? width : 32) / 2; step > 0; step /= 2)
#pragma unroll
    for (int s = 0; s < kSums; ++s) v[s] += core::shuffle_xor(v[s], step);
  if (width <= 32) return;
  const int thread = threadIdx.x, warp = thread / 32, warps = width / 32;
  const auto place = [&](int s, int w) { return shared + (s * (kBlock / 32) + w) * 4; };
  if (thread % 32 == 0)
#pragma unroll
    for (int s = 0; s < kSums; ++s) core::store_shared(place(s, warp), v[s]);
  core::sync_block();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    v[s] = 0;
    for (int w = warp / warps * warps, end = w + warps; w < end; ++w) v[s] += core::load_shared<float>(place(s, w));
  }
  core::sync_block();  // before the next call writes `shared`
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

#if defined(HDIT_EMULATION)

class DeviceGuard {
 public:
  DeviceGuard(int, const std::string&) {}
};

namespace core {

template <class... P, class... A>
void launch(const std::string& call, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, A... args) {
  emulation::launch(call, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [=] { kernel(args...); });
}

inline void set_to_zero(void* p, size_t bytes, void*, const std::string&) { std::memset(p, 0, bytes); }
inline int multiprocessors() { return emulation::settings.multiprocessors; }
inline size_t most_shared_bytes() { return emulation::settings.shared_bytes; }

}  // namespace core

#else

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

namespace core {

// Enqueues kernel(args...) on `stream`; `call` names the kernel and the shape in the error that a failure throws.
template <class... P, class... A>
void launch(const std::string& call, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            A... args) {
  if (shared_bytes > (48 << 10))  // what a launch may have unasked
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          call);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), call);
}

inline void set_to_zero(void* p, size_t bytes, void* stream, const std::string& call) {
  check(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)), call);
}

inline int attribute_of_device(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "a question about the device");
  check(cudaDeviceGetAttribute(&value, which, device), "a question about the device");
  return value;
}
inline int multiprocessors() { return attribute_of_device(cudaDevAttrMultiProcessorCount); }
// That a block can have.
inline size_t most_shared_bytes() { return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace core
#endif

}  // namespace hdit
