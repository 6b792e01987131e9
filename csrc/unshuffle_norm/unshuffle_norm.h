// SPDX-License-Identifier: Apache-2.0
// Pixel-unshuffle, LayerNorm over the f²C channels of a window, and the mean of its tokens, in one
// pass over the tokens. No torch here.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

// Strides in elements, between rows; channels are contiguous. N tokens, M windows of side f, K =
// f²C channels per window. "wide" is double for float64, else float.
struct UnshuffleNorm {
  ViewTable views;
  DType dtype;
  int64_t channels;  // C
  double eps;
  const void* x;  // (N, C)
  int64_t x_stride;
  const void *norm_weight, *norm_bias;  // (K,) wide, or null
  void* z;                              // (M, K) contiguous
  void* residual;                       // (M, C) contiguous, or null
  void *mean, *rstd;                    // (M,) wide; written by the forward pass, read by the other
  // backward only
  const void *grad_z, *grad_residual;  // (M, K); (M, C) or null
  int64_t grad_z_stride, grad_residual_stride;
  void* grad_x;    // (N, C) contiguous
  void* partials;  // (blocks, 2, K) wide, or null: the two gradients below of each block of windows
  void *grad_norm_weight, *grad_norm_bias;  // (K,) wide, or null

  UHD_EVERYWHERE int64_t merged_channels() const { return views.window * views.window * channels; }
};

// The gradients of the LayerNorm's parameters are summed over the windows of a block, then over the
// blocks in order, so that the result does not depend on the number of threads. A block's sums take
// 2 K elements, a small part of the 32 K elements that it reads.
constexpr int64_t kWindowsPerBlock = 32;

UHD_PER_ISA(
    // Windows [begin, end).
    void unshuffle_norm_forward(const UnshuffleNorm& args, int64_t begin, int64_t end);
    // Blocks of windows [begin, end).
    void unshuffle_norm_backward(const UnshuffleNorm& args, int64_t begin, int64_t end);
    // Sums the partials of all blocks; channels [begin, end) of the K.
    void unshuffle_norm_sum_partials(const UnshuffleNorm& args, int64_t begin, int64_t end);)

// All windows; nullptr, or the text of an error.
namespace cuda {
// Blocks of partials that the backward pass wants; depends on the sizes only.
int64_t unshuffle_norm_blocks(const UnshuffleNorm& args);
const char* unshuffle_norm_forward(const UnshuffleNorm& args, void* stream);
const char* unshuffle_norm_backward(const UnshuffleNorm& args, void* stream);
}  // namespace cuda

}  // namespace uhd
