// SPDX-License-Identifier: Apache-2.0
// Where the three gradients of the backward pass lie.
#pragma once
#include "common/windows.cuh"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

UHD_DEVICE TokenStrides grad_q_strides(const WindowAttention& args) {
  return {args.grad_q_stride, args.head_dim};
}
UHD_DEVICE TokenStrides grad_kv_strides(const WindowAttention& args) {
  return {args.grad_kv_stride, args.head_dim};
}

// Writes zeros to the rows beyond the tokens of the views.
template <class T>
UHD_DEVICE void zero_gradient_padding(const WindowAttention& args) {
  const int64_t begin = args.views.num_tokens(), end = args.views.token_rows;
  const int64_t q_row = args.heads * args.head_dim, kv_row = args.kv_heads * args.head_dim;
  zero_rows(static_cast<T*>(args.grad_q), args.grad_q_stride, q_row, begin, end);
  for (void* grad : {args.grad_k, args.grad_v}) {
    zero_rows(static_cast<T*>(grad), args.grad_kv_stride, kv_row, begin, end);
  }
}

}  // namespace
}  // namespace uhd
