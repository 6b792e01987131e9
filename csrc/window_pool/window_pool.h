// SPDX-License-Identifier: Apache-2.0
// Content-adaptive pooling: each channel of a window is the mean of its tokens, weighted by the
// softmax of their logits in that channel. No torch here.
//
// A weight is exp(logit - largest) * pool_scale(tokens), not yet divided by the sum of the weights.
// The scale keeps sums of weighted tokens within the largest token, so that nothing overflows on
// the way; as a power of two it rounds nothing, and equal logits give the mean bit for bit.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

// N packed tokens, M windows, C channels. Rows are contiguous; strides between rows in elements,
// not bytes.
struct WindowPool {
  ViewTable views;
  DType dtype;
  int64_t channels;
  const void* x;  // (N, C)
  int64_t x_stride;
  const void* logits;  // (N, C)
  int64_t logits_stride;
  // forward
  void* out;  // (M, C) contiguous
  // backward
  const void* grad_out;  // (M, C)
  int64_t grad_out_stride;
  void* grad_x;       // (N, C) contiguous
  void* grad_logits;  // (N, C) contiguous
};

// The largest power of two that is at most 1 / tokens, for a window that is not empty.
template <class S>
UHD_EVERYWHERE constexpr S pool_scale(int64_t tokens) {
  S scale = 1;
  for (int64_t covered = 1; covered < tokens; covered *= 2) scale /= 2;
  return scale;
}

// Both process the windows [begin, end): forward writes their pooled tokens, backward the gradients
// of their tokens and logits, every element once.
UHD_PER_ISA(void window_pool_forward(const WindowPool& args, int64_t begin, int64_t end);
            void window_pool_backward(const WindowPool& args, int64_t begin, int64_t end);)

// All windows; nullptr, or the text of an error.
namespace cuda {
const char* window_pool_forward(const WindowPool& args, void* stream);
const char* window_pool_backward(const WindowPool& args, void* stream);
}  // namespace cuda

}  // namespace uhd
