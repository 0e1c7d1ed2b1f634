// GEGLU (Shazeer, "GLU variants improve transformer", arXiv 2002.05202) with the exact GELU: y = value · gate · Φ(gate).
#pragma once

#include "core.h"

namespace hdit {

// Strides count elements; the last axis of every tensor is contiguous. A row stride may be 0.
struct GegluForward {
  const void* x;  // (rows, 2n): value, gate
  void* y;        // (rows, n), contiguous
  int64_t rows, n, x_row_stride;
  DType dtype;  // of x, y
};

struct GegluBackward {
  const void* x;   // (rows, 2n): value, gate
  const void* dy;  // (rows, n)
  void* dx;        // (rows, 2n), contiguous: dvalue, dgate
  int64_t rows, n, x_row_stride, dy_row_stride;
  DType dtype;  // of x, dy, dx
};

template <class InstructionSet>
void geglu_forward(const GegluForward& args, int threads);
template <class InstructionSet>
void geglu_backward(const GegluBackward& args, int threads);

// Enqueued on `stream`, a cudaStream_t of `device`. They throw std::runtime_error.
void geglu_forward_cuda(const GegluForward& args, int device, void* stream);
void geglu_backward_cuda(const GegluBackward& args, int device, void* stream);

// The normal distribution function in float32: Φ(g) = 1/2 + g·P(g²)/Q(g²) for |g| <= kNormalEnd, a minimax fit; beyond, 0 or
// 1, from which Φ differs by less than half a unit in the last place of 1. The fit is good to 6e-9, its value in float32 to
// 1.5e-7, as (1 + erf(g/√2))/2 with an erf of 3 units in the last place.
constexpr float kNormalEnd = 5.4f;
constexpr float kInverseSqrt2Pi = 0.3989422804f;

template <class V>
#ifdef __CUDACC__
__device__
#endif
inline V normal_numerator(V g, V g_squared) {
  V p = g_squared * 2.346667571373473e-08f + 6.341580956359394e-06f;
  p = p * g_squared + 0.00016268320905510336f;
  p = p * g_squared + 0.004641040228307247f;
  p = p * g_squared + 0.03321921080350876f;
  p = p * g_squared + 0.3989422619342804f;
  return p * g;
}

template <class V>
#ifdef __CUDACC__
__device__
#endif
inline V normal_denominator(V g_squared) {
  V q = g_squared * 1.2175275969639188e-06f + 7.18332885298878e-05f;
  q = q * g_squared + 0.0018498663557693362f;
  q = q * g_squared + 0.028289886191487312f;
  q = q * g_squared + 0.24993455410003662f;
  return q * g_squared + 1.0f;
}

}  // namespace hdit
