// Cosine-similarity normalisation and axial RoPE of queries and keys (HDiT, arXiv 2401.11605, sections 3.2 and 3.3):
// q' = cosine_scale[h] · R(q · rsqrt(Σq² + 1e-6)) and k' = R(k · rsqrt(Σk² + 1e-6)), where R turns features i and i + 2·angles of
// a head by height_angles[y, h, i] for i < angles and by width_angles[x, h, i − angles] for angles <= i < 2·angles.
#pragma once

#include "core.h"  // Tokens

namespace hdit {

// "Wide" below is float32, or float64 where q is float64.
struct CosineRope {
  Tokens q, k;                // (batch, height, width, heads, dim)
  const void* cosine_scale;   // (heads,) wide
  const void* height_angles;  // (height, heads, angles), of angles_dtype
  const void* width_angles;   // (width, heads, angles), of angles_dtype
  int64_t batch, height, width, heads, dim, angles;
  DType angles_dtype;  // float32 or float64; with float64 q float64
  DType dtype;         // of q, k, q', k' and their gradients
};

struct CosineRopeForward {
  CosineRope inputs;
  void *q_prepared, *k_prepared;  // (batch, height, width, heads, dim), contiguous
};

struct CosineRopeBackward {
  CosineRope inputs;
  Tokens dq_prepared, dk_prepared;  // (batch, height, width, heads, dim)
  void *dq, *dk;                    // (batch, height, width, heads, dim), contiguous; or null: not wanted
  void* dcosine_scale;              // (heads,) wide, or null: not wanted
};

template <class InstructionSet>
void cosine_rope_forward(const CosineRopeForward& args, int threads);
template <class InstructionSet>
void cosine_rope_backward(const CosineRopeBackward& args, int threads);

// Enqueued on `stream`, a cudaStream_t of `device`. They throw std::runtime_error.
void cosine_rope_forward_cuda(const CosineRopeForward& args, int device, void* stream);
// workspace: cosine_rope_backward_workspace_cuda(…) bytes of device memory, unused when dcosine_scale is null.
void cosine_rope_backward_cuda(const CosineRopeBackward& args, void* workspace, int device, void* stream);
int64_t cosine_rope_backward_workspace_cuda(const CosineRope& args);

}  // namespace hdit
