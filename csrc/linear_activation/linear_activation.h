// SPDX-License-Identifier: Apache-2.0
// What follows the product of a linear layer: bias, activation, and the mean over groups of rows,
// in one pass. The product itself is torch's. No torch here.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/view_table.h"

namespace uhd {

enum class Activation { kGeluTanh, kGelu, kQuickGelu, kSilu, kRelu };

// R rows of products give R / group rows of h. "wide" is double for float64, else float.
struct LinearActivation {
  DType dtype;
  Activation activation;
  int64_t width, group;  // O outputs of the layer; rows that are averaged
  const void *u, *bias;  // (R, O) contiguous, the products; (O,) to be added to them, or null
  void* h;               // (R / group, O) contiguous
  // backward only
  const void* grad_h;     // (R / group, O)
  int64_t grad_h_stride;  // in elements, between rows
  int64_t rows;           // R / group
  void* grad_u;           // (R, O) contiguous
  void* partials;         // (blocks, O) wide, or null: grad_bias of every block of rows of h
  void* grad_bias;        // (O,) wide, or null

  UHD_EVERYWHERE int64_t rows_per_block() const {
    return group < kProductsPerBlock ? kProductsPerBlock / group : 1;
  }
  int64_t blocks() const { return (rows + rows_per_block() - 1) / rows_per_block(); }

  // grad_bias is summed over blocks of 64 rows of products and then over the blocks in order, so
  // that it does not depend on the number of threads.
  static constexpr int64_t kProductsPerBlock = 64;
};

UHD_PER_ISA(
    // Rows [begin, end) of h; u and h start at row 0.
    void linear_activation_forward(const LinearActivation& args, int64_t begin, int64_t end);
    // Blocks of rows of h [begin, end).
    void linear_activation_backward(const LinearActivation& args, int64_t begin, int64_t end);
    // Sums the partials of all blocks; outputs [begin, end).
    void linear_activation_sum_partials(const LinearActivation& args, int64_t begin, int64_t end);)

// All rows; nullptr, or the text of an error.
namespace cuda {
const char* linear_activation_forward(const LinearActivation& args, void* stream);
const char* linear_activation_backward(const LinearActivation& args, void* stream);
}  // namespace cuda

}  // namespace uhd
