// SPDX-License-Identifier: Apache-2.0
// The tokens of each f x f window side by side in one merged token. No torch here.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

// N packed tokens, M windows of side f, C channels. Rows are contiguous; strides between rows in
// elements, not bytes.
struct PixelUnshuffle {
  ViewTable views;
  DType dtype;
  int64_t channels;
  // forward: the slots of a window in raster order, C channels each
  const void* x;  // (N, C)
  int64_t x_stride;
  void* out;  // (M, f*f*C) contiguous
  // backward
  const void* grad_out;  // (M, f*f*C)
  int64_t grad_out_stride;
  void* grad_x;  // (N, C) contiguous
};

// Both process the windows [begin, end): forward writes their merged tokens, backward the gradient
// of their tokens, every element once.
UHD_PER_ISA(void pixel_unshuffle_forward(const PixelUnshuffle& args, int64_t begin, int64_t end);
            void pixel_unshuffle_backward(const PixelUnshuffle& args, int64_t begin, int64_t end);)

// All windows; nullptr, or the text of an error.
namespace cuda {
const char* pixel_unshuffle_forward(const PixelUnshuffle& args, void* stream);
const char* pixel_unshuffle_backward(const PixelUnshuffle& args, void* stream);
}  // namespace cuda

}  // namespace uhd
