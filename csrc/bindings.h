// What the bindings of the CPU and of the CUDA kernels share: arguments, checked and packed. The callers own the tensors and
// have checked them; what is checked here keeps a mistake of theirs from becoming a wild read.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "ada_rms_norm.h"
#include "cosine_rope.h"
#include "geglu.h"
#include "neighborhood_attention/neighborhood_attention.h"

namespace hdit {

namespace py = pybind11;

void bind_cuda(py::module_ m);  // bindings_cuda.cpp

using Address = uintptr_t;

inline const std::vector<std::pair<const char*, DType>> kDtypes = {{"float32", DType::float32},
                                                            {"bfloat16", DType::bfloat16},
                                                            {"float16", DType::float16},
                                                            {"float64", DType::float64}};

// ---- checks --------------------------------------------------------------------------------------------------------------
inline DType dtype_of(const char* function, int code) {
  std::string codes;
  for (const auto& [name, dtype] : kDtypes) {
    if (int(dtype) == code) return dtype;
    codes += (codes.empty() ? "" : ", ") + std::to_string(int(dtype)) + " (" + name + ")";
  }
  throw py::value_error(std::string(function) + ": dtype is " + std::to_string(code) + ", but must be one of " + codes);
}

using Named = std::vector<std::pair<const char*, int64_t>>;

inline void check_not_negative(const char* function, const Named& values) {
  for (const auto& [name, value] : values)
    if (value < 0)
      throw py::value_error(std::string(function) + ": " + name + " is " + std::to_string(value) + ", but must be at least 0");
}

inline void check_not_null(const char* function, const std::vector<std::pair<const char*, Address>>& pointers) {
  for (const auto& [name, address] : pointers)
    if (address == 0)
      throw py::value_error(std::string(function) + ": " + name + " is 0, but must be the address of a tensor with elements");
}

inline void check_threads(const char* function, int threads) {
  if (threads < 1)
    throw py::value_error(std::string(function) + ": threads is " + std::to_string(threads) + ", but must be at least 1");
}

// ---- arguments, checked and packed: the same for every device --------------------------------------------------------------
inline GegluForward geglu_forward_args(Address x, Address y, int64_t rows, int64_t n, int64_t x_row_stride, int dtype) {
  const char* function = "geglu_forward";
  check_not_negative(function, {{"rows", rows}, {"n", n}, {"x_row_stride", x_row_stride}});
  if (rows > 0 && n > 0) check_not_null(function, {{"x", x}, {"y", y}});
  return {(const void*)x, (void*)y, rows, n, x_row_stride, dtype_of(function, dtype)};
}

inline GegluBackward geglu_backward_args(Address x, Address dy, Address dx, int64_t rows, int64_t n, int64_t x_row_stride,
                                  int64_t dy_row_stride, int dtype) {
  const char* function = "geglu_backward";
  check_not_negative(function,
                     {{"rows", rows}, {"n", n}, {"x_row_stride", x_row_stride}, {"dy_row_stride", dy_row_stride}});
  if (rows > 0 && n > 0) check_not_null(function, {{"x", x}, {"dy", dy}, {"dx", dx}});
  return {(const void*)x, (const void*)dy, (void*)dx,     rows,
          n,              x_row_stride,    dy_row_stride, dtype_of(function, dtype)};
}

inline AdaRmsNormForward ada_rms_norm_forward_args(Address x, Address scale, Address y, int64_t batch, int64_t tokens,
                                            int64_t channels, int64_t x_batch_stride, int64_t x_token_stride,
                                            int64_t scale_batch_stride, double eps, int dtype) {
  const char* function = "ada_rms_norm_forward";
  check_not_negative(function, {{"batch", batch},
                                {"tokens", tokens},
                                {"channels", channels},
                                {"x_batch_stride", x_batch_stride},
                                {"x_token_stride", x_token_stride},
                                {"scale_batch_stride", scale_batch_stride}});
  if (batch > 0 && tokens > 0 && channels > 0) check_not_null(function, {{"x", x}, {"scale", scale}, {"y", y}});
  return {(const void*)x, (const void*)scale, (void*)y,           batch, tokens,
          channels,       x_batch_stride,     x_token_stride,     scale_batch_stride,
          eps,            dtype_of(function, dtype)};
}

inline AdaRmsNormBackward ada_rms_norm_backward_args(Address x, Address scale, Address dy, Address dx, Address dscale,
                                              int64_t batch, int64_t tokens, int64_t channels, int64_t x_batch_stride,
                                              int64_t x_token_stride, int64_t dy_batch_stride, int64_t dy_token_stride,
                                              int64_t scale_batch_stride, double eps, int dtype) {
  const char* function = "ada_rms_norm_backward";
  check_not_negative(function, {{"batch", batch},
                                {"tokens", tokens},
                                {"channels", channels},
                                {"x_batch_stride", x_batch_stride},
                                {"x_token_stride", x_token_stride},
                                {"dy_batch_stride", dy_batch_stride},
                                {"dy_token_stride", dy_token_stride},
                                {"scale_batch_stride", scale_batch_stride}});
  if (batch > 0 && tokens > 0 && channels > 0) check_not_null(function, {{"x", x}, {"scale", scale}, {"dy", dy}});
  return {(const void*)x, (const void*)scale, (const void*)dy, (void*)dx,
          (void*)dscale,  batch,              tokens,          channels,
          x_batch_stride, x_token_stride,     dy_batch_stride, dy_token_stride,
          scale_batch_stride, eps, dtype_of(function, dtype)};
}

// Addresses and strides of tokens; windows as [length, kernel, stride, dilation, causal].
using Row = std::array<int64_t, 5>;

inline Tokens tokens_of(const Row& row) { return {(void*)row[0], row[1], row[2], row[3], row[4]}; }

inline NeighborhoodAttention neighborhood_attention_args(const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers,
                                                  const std::array<int64_t, 6>& sizes, const std::array<Row, 2>& windows,
                                                  double scale, int dtype) {
  const char* function = "neighborhood_attention";
  const auto& [batch, heads, dim, v_dim, angles, extra] = sizes;
  check_not_negative(function, {{"batch", batch}, {"heads", heads}, {"dim", dim}, {"v_dim", v_dim}, {"angles", angles},
                                {"extra", extra}});
  Window axes[2];
  for (int i = 0; i < 2; ++i) {
    const auto& [length, kernel, stride, dilation, causal] = windows[i];
    if (kernel < 1 || dilation < 1 || stride < 1 || stride > kernel || kernel * dilation > length || 4 * angles > dim)
      throw py::value_error("neighborhood_attention: window or angles do not fit the grid or the heads");
    axes[i] = {length, kernel, stride, dilation, causal != 0};
  }
  return {tokens_of(tokens[0]), tokens_of(tokens[1]), tokens_of(tokens[2]), tokens_of(tokens[3]), tokens_of(tokens[4]),
          (const void*)pointers[0], (const void*)pointers[1], (const void*)pointers[2], (const bool*)pointers[3],
          (void*)pointers[4], (void*)pointers[5], batch, heads, dim, v_dim, angles, extra, axes[0], axes[1], scale,
          dtype_of(function, dtype)};
}

inline CosineRope cosine_rope_args(const char* function, const Row& q, const Row& k, const std::array<Address, 3>& pointers,
                            const std::array<int64_t, 6>& sizes, int angles_dtype, int dtype) {
  const auto& [batch, height, width, heads, dim, angles] = sizes;
  check_not_negative(function, {{"batch", batch}, {"height", height}, {"width", width}, {"heads", heads}, {"dim", dim},
                                {"angles", angles}});
  if (4 * angles > dim)
    throw py::value_error(std::string(function) + ": angles is " + std::to_string(angles) + ", but must be at most dim/4 = " +
                          std::to_string(dim / 4));
  if (batch * height * width * heads > 0)
    check_not_null(function, {{"q", Address(q[0])}, {"k", Address(k[0])}, {"cosine_scale", pointers[0]}});
  const DType of_angles = dtype_of(function, angles_dtype), of_tokens = dtype_of(function, dtype);
  if (of_angles != DType::float64 && (of_angles != DType::float32 || of_tokens == DType::float64))
    throw py::value_error(std::string(function) + ": angles_dtype is " + std::to_string(angles_dtype) +
                          ", but must be float64 or, unless dtype is float64, float32");
  return {tokens_of(q), tokens_of(k), (const void*)pointers[0], (const void*)pointers[1], (const void*)pointers[2],
          batch, height, width, heads, dim, angles, of_angles, of_tokens};
}

inline CosineRopeForward cosine_rope_forward_args(const Row& q, const Row& k, const std::array<Address, 3>& pointers,
                                                  const std::array<int64_t, 6>& sizes, int angles_dtype, int dtype,
                                                  Address q_prepared, Address k_prepared) {
  return {cosine_rope_args("cosine_rope_forward", q, k, pointers, sizes, angles_dtype, dtype), (void*)q_prepared,
          (void*)k_prepared};
}

inline CosineRopeBackward cosine_rope_backward_args(const Row& q, const Row& k, const std::array<Address, 3>& pointers,
                                                    const std::array<int64_t, 6>& sizes, int angles_dtype, int dtype,
                                                    const Row& dq_prepared, const Row& dk_prepared, Address dq, Address dk,
                                                    Address dcosine_scale) {
  return {cosine_rope_args("cosine_rope_backward", q, k, pointers, sizes, angles_dtype, dtype), tokens_of(dq_prepared),
          tokens_of(dk_prepared), (void*)dq, (void*)dk, (void*)dcosine_scale};
}

// grad_tokens: dout, dq, dk, dv, dextra_k, dextra_v. 0: absent.
inline NeighborhoodAttentionBackward neighborhood_attention_backward_args(
    const std::array<Row, 5>& tokens, const std::array<Address, 6>& pointers, const std::array<int64_t, 6>& sizes,
    const std::array<Row, 2>& windows, double scale, int dtype, const std::array<Row, 6>& grad_tokens, Address dlse,
    Address dcosine_scale) {
  const auto& [dout, dq, dk, dv, dextra_k, dextra_v] = grad_tokens;
  return {neighborhood_attention_args(tokens, pointers, sizes, windows, scale, dtype), tokens_of(dout), (const void*)dlse,
          tokens_of(dq), tokens_of(dk), tokens_of(dv), tokens_of(dextra_k), tokens_of(dextra_v), (void*)dcosine_scale};
}

// ---- the module ------------------------------------------------------------------------------------------------------------
using Unlocked = py::call_guard<py::gil_scoped_release>;

// The arguments of each function, before `threads` on the CPU and (`workspace`,) `device`, `stream` on CUDA.
#define GEGLU_FORWARD "x"_a, "y"_a, "rows"_a, "n"_a, "x_row_stride"_a, "dtype"_a
#define GEGLU_BACKWARD "x"_a, "dy"_a, "dx"_a, "rows"_a, "n"_a, "x_row_stride"_a, "dy_row_stride"_a, "dtype"_a
#define ADA_RMS_NORM_FORWARD                                                                                            \
  "x"_a, "scale"_a, "y"_a, "batch"_a, "tokens"_a, "channels"_a, "x_batch_stride"_a, "x_token_stride"_a,                 \
      "scale_batch_stride"_a, "eps"_a, "dtype"_a
#define ADA_RMS_NORM_BACKWARD                                                                                           \
  "x"_a, "scale"_a, "dy"_a, "dx"_a, "dscale"_a, "batch"_a, "tokens"_a, "channels"_a, "x_batch_stride"_a,                \
      "x_token_stride"_a, "dy_batch_stride"_a, "dy_token_stride"_a, "scale_batch_stride"_a, "eps"_a, "dtype"_a
#define COSINE_ROPE "q"_a, "k"_a, "pointers"_a, "sizes"_a, "angles_dtype"_a, "dtype"_a
#define COSINE_ROPE_FORWARD COSINE_ROPE, "q_prepared"_a, "k_prepared"_a
#define COSINE_ROPE_BACKWARD COSINE_ROPE, "dq_prepared"_a, "dk_prepared"_a, "dq"_a, "dk"_a, "dcosine_scale"_a
#define NEIGHBORHOOD_ATTENTION "tokens"_a, "pointers"_a, "sizes"_a, "windows"_a, "scale"_a, "dtype"_a
#define NEIGHBORHOOD_ATTENTION_BACKWARD NEIGHBORHOOD_ATTENTION, "grad_tokens"_a, "dlse"_a, "dcosine_scale"_a
#define WORKSPACE "Bytes of device memory that the kernel of this name and these arguments wants as workspace."

}  // namespace hdit
