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

}  // namespace hdit
