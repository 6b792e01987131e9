// SPDX-License-Identifier: Apache-2.0
// Attention inside each window of a view: softmax(scale * q k^T) v over the tokens of the window.
// No torch here.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

// Tensors are (N, heads, D) with D contiguous; strides in elements, not bytes. N packed tokens.
struct TokenStrides {
  int64_t token, head;
};

struct WindowAttention {
  ViewTable views;
  DType dtype;
  int64_t heads, head_dim;
  int64_t kv_heads, group;  // k and v have fewer heads, each for `group` heads of q
  double scale;
  const void *q, *k, *v;
  TokenStrides q_strides, k_strides, v_strides;
  void* out;           // (N, H, D), the heads of a token side by side
  int64_t out_stride;  // from one token to the next; for CUDA, contiguous
  bool window_order;   // out and grad_out are in window-major instead of raster order
  // Rotary embedding of q and k that the CPU kernels apply, or null. Tables (N, 1 or H, D) of the
  // accumulation type; a channel pairs with its neighbour, or in each of so many parts with that
  // half a part away.
  const void *cos, *sin;
  TokenStrides table_strides;
  int64_t rotary_parts;
  // backward only
  const void* grad_out;
  TokenStrides grad_out_strides;
  // The heads of a token lie side by side; strides from one token to the next. All three may lie in
  // one tensor, as q, k and v do in that of a packed projection.
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_q_stride, grad_kv_stride;
  void* scratch;  // CUDA: window_attention_backward_scratch elements
};

// Elements of float (double for float64) that one thread needs beside its registers, when no window
// holds more than `tokens` tokens.
int64_t window_attention_scratch(const WindowAttention& args, int64_t tokens);

// Both process the windows [begin, end) and write every output token of those windows once.
UHD_PER_ISA(void window_attention_forward(const WindowAttention& args, int64_t begin, int64_t end,
                                          void* scratch);
            void window_attention_backward(const WindowAttention& args, int64_t begin, int64_t end,
                                           void* scratch);)

// What CUDA kernels know of a rotary embedding: some heads of x, rotated by the angles of the
// tables or back by their opposites. out has its heads side by side, and may be x.
struct RotateHeads {
  ViewTable views;
  DType dtype;
  int64_t heads, head_dim, parts;
  const void* x;
  TokenStrides x_strides;
  const void *cos, *sin;  // as in WindowAttention
  TokenStrides table_strides;
  void* out;
  int64_t out_stride;
  bool back;
};

// All windows; nullptr, or the text of an error.
namespace cuda {
const char* rotate_heads(const RotateHeads& args, void* stream);
// Elements of float (double for float64) that the backward pass needs.
int64_t window_attention_backward_scratch(const WindowAttention& args);
const char* window_attention_forward(const WindowAttention& args, void* stream);
const char* window_attention_backward(const WindowAttention& args, void* stream);
}  // namespace cuda

}  // namespace uhd
