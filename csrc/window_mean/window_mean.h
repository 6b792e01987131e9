// SPDX-License-Identifier: Apache-2.0
// The mean of the tokens that each window holds. No torch here.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

// N packed tokens, M windows, C channels. Rows are contiguous; strides between rows in elements,
// not bytes.
struct WindowMean {
  ViewTable views;
  DType dtype;
  int64_t channels;
  // forward
  const void* x;  // (N, C)
  int64_t x_stride;
  void* out;  // (M, C) contiguous
  // backward
  const void* grad_out;  // (M, C)
  int64_t grad_out_stride;
  void* grad_x;  // (N, C) contiguous
};

// Both process the windows [begin, end): forward writes their means, backward the gradient of their
// tokens, every element once.
UHD_PER_ISA(void window_mean_forward(const WindowMean& args, int64_t begin, int64_t end);
            void window_mean_backward(const WindowMean& args, int64_t begin, int64_t end);)

// All windows; nullptr, or the text of an error.
namespace cuda {
const char* window_mean_forward(const WindowMean& args, void* stream);
const char* window_mean_backward(const WindowMean& args, void* stream);
}  // namespace cuda

}  // namespace uhd
