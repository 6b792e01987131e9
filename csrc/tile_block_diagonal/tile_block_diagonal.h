// SPDX-License-Identifier: Apache-2.0
// A weight repeated along the diagonal of a larger one that is zero elsewhere. No torch here.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace uhd {

// O rows of I inputs, T tiles. Rows are contiguous; strides between rows in elements, not bytes.
struct TileBlockDiagonal {
  DType dtype;
  int64_t tiles, rows, cols;  // T, O, I
  // forward
  const void* weight;  // (O, I)
  int64_t weight_stride;
  void* out;  // (T*O, T*I) contiguous
  // backward
  const void* grad_out;  // (T*O, T*I)
  int64_t grad_out_stride;
  void* grad_weight;  // (O, I) contiguous
};

// Forward writes the rows [begin, end) of out, backward those of grad_weight, every element once.
UHD_PER_ISA(void tile_block_diagonal_forward(const TileBlockDiagonal& args, int64_t begin,
                                             int64_t end);
            void tile_block_diagonal_backward(const TileBlockDiagonal& args, int64_t begin,
                                              int64_t end);)

// All rows; nullptr, or the text of an error.
namespace cuda {
const char* tile_block_diagonal_forward(const TileBlockDiagonal& args, void* stream);
const char* tile_block_diagonal_backward(const TileBlockDiagonal& args, void* stream);
}  // namespace cuda

}  // namespace uhd
