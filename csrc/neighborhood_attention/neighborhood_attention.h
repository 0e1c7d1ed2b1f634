// 2-D neighborhood attention (Hassani et al., arXiv 2204.07143) with the cosine similarity and axial RoPE of HDiT
// (arXiv 2401.11605) inside: softmax over the window of each query, logits = scale · cosine_scale[h] · cos(q, k), or scale · q·k.
#pragma once

#include "core.h"

namespace hdit {

// The window along one dimension, NATTEN's rule: see hdit_kernels/neighborhood_attention.py, window().
struct Window {
  int64_t length, kernel, stride, dilation;
  bool causal;
};

// "Wide" below is float32, or float64 where q is float64.
struct NeighborhoodAttention {
  Tokens q, k, v;             // (batch, height, width, heads, dim); v: v_dim
  Tokens extra_k, extra_v;    // (batch, extra, heads, dim); v_dim
  const void* cosine_scale;   // (heads,) wide, or null: plain dot products
  const void* height_angles;  // (height, heads, angles) wide
  const void* width_angles;   // (width, heads, angles) wide
  const bool* key_mask;       // (batch, height, width) contiguous, or null; false: not attended
  void* out;                  // (batch, height, width, heads, v_dim), contiguous
  void* lse;                  // (batch, height, width, heads) wide, contiguous
  int64_t batch, heads, dim, v_dim, angles, extra;
  Window rows, columns;
  double scale;
  DType dtype;  // of q, k, v, out and their gradients
};

struct NeighborhoodAttentionBackward {
  NeighborhoodAttention forward;  // out and lse are not read
  Tokens dout;                    // (batch, height, width, heads, v_dim), or data null: zeros
  const void* dlse;               // (batch, height, width, heads) wide, contiguous, or null: zeros
  Tokens dq, dk, dv;              // written; data null: not wanted
  Tokens dextra_k, dextra_v;      // written; data null: not wanted
  void* dcosine_scale;            // (batch, heads) wide, written, to be summed over the batch; or null
};

// The fast path: marching strips (strips.h). False, and nothing done, where it does not apply.
template <class InstructionSet>
bool neighborhood_attention_strips_forward(const NeighborhoodAttention& args, int threads);
template <class InstructionSet>
bool neighborhood_attention_strips_backward(const NeighborhoodAttentionBackward& args, int threads);

template <class InstructionSet>
void neighborhood_attention_forward(const NeighborhoodAttention& args, int threads);
template <class InstructionSet>
void neighborhood_attention_backward(const NeighborhoodAttentionBackward& args, int threads);

// CUDA. Enqueued on `stream`, a cudaStream_t of `device`; they throw std::runtime_error. The backward pass reads out and lse
// of the forward pass, and needs a workspace of that many bytes.
void neighborhood_attention_forward_cuda(const NeighborhoodAttention& args, int device, void* stream);
int64_t neighborhood_attention_workspace_cuda(const NeighborhoodAttentionBackward& args);
void neighborhood_attention_backward_cuda(const NeighborhoodAttentionBackward& args, void* workspace, int device,
                                          void* stream);

// The fast path: marching strips. False, and nothing done, where it does not apply; its workspace is 0 there.
bool neighborhood_attention_strips_forward_cuda(const NeighborhoodAttention& args, void* stream);
int64_t neighborhood_attention_strips_workspace_cuda(const NeighborhoodAttentionBackward& args);
bool neighborhood_attention_strips_backward_cuda(const NeighborhoodAttentionBackward& args, void* workspace, void* stream);

#ifndef HDIT_DEVICE_CODE  // what both CPU files use
namespace {

constexpr double kEps = 1e-6;  // in the lengths of q and k, as in the reference

// What multiplies q·k, or the cosine: |logit| <= |this| with cosine similarity.
template <class S>
inline S logit_factor(const NeighborhoodAttention& a, int64_t h) {
  return S(a.scale) * (a.cosine_scale == nullptr ? S(1) : static_cast<const S*>(a.cosine_scale)[h]);
}

}  // namespace
#endif

}  // namespace hdit
