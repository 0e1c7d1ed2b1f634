// AdaRMSNorm: RMSNorm (Zhang & Sennrich, arXiv 1910.07467) with a scale per sample, y = x · rsqrt(mean(x²) + eps) · scale.
#pragma once

#include "core.h"

namespace hdit {

// Strides count elements; the last axis of every tensor is contiguous. Scale and its gradient are float32, or float64 where
// x is float64: (batch, channels), or (channels,) when scale_batch_stride is 0.
struct AdaRmsNormForward {
  const void* x;      // (batch, tokens, channels)
  const void* scale;  // (batch, channels) or (channels,)
  void* y;            // (batch, tokens, channels), contiguous
  int64_t batch, tokens, channels;
  int64_t x_batch_stride, x_token_stride, scale_batch_stride;
  double eps;
  DType dtype;  // of x, y
};

struct AdaRmsNormBackward {
  const void* x;      // (batch, tokens, channels)
  const void* scale;  // (batch, channels) or (channels,)
  const void* dy;     // (batch, tokens, channels)
  void* dx;           // (batch, tokens, channels), contiguous; or null: not wanted
  void* dscale;       // (batch, channels) or (channels,), contiguous; or null: not wanted
  int64_t batch, tokens, channels;
  int64_t x_batch_stride, x_token_stride, dy_batch_stride, dy_token_stride, scale_batch_stride;
  double eps;
  DType dtype;  // of x, dy, dx
};

template <class InstructionSet>
void ada_rms_norm_forward(const AdaRmsNormForward& args, int threads);
template <class InstructionSet>
void ada_rms_norm_backward(const AdaRmsNormBackward& args, int threads);

// Enqueued on `stream`, a cudaStream_t of `device`. They throw std::runtime_error.
void ada_rms_norm_forward_cuda(const AdaRmsNormForward& args, int device, void* stream);
// workspace: ada_rms_norm_backward_workspace_cuda(…) bytes of device memory, unused when dscale is null.
void ada_rms_norm_backward_cuda(const AdaRmsNormBackward& args, void* workspace, int device, void* stream);
int64_t ada_rms_norm_backward_workspace_cuda(int64_t batch, int64_t tokens, int64_t channels);

}  // namespace hdit
