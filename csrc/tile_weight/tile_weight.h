// SPDX-License-Identifier: Apache-2.0
// A weight laid out several times in a larger one. No torch here.
//
//   block_diagonal  (T*O, T*I)  on the diagonal, zeros elsewhere
//   average         (O, T*I)    side by side, divided by T
//   repeat          (T*I,)      a vector, end to end: one row, T times below itself
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace uhd {

// O rows of I inputs, T tiles. Rows are contiguous; strides between rows in elements, not bytes.
struct TileWeight {
  DType dtype;
  int64_t tiles, rows, cols;  // T, O, I
  int64_t down, across;       // tiles below each other and side by side: T, or 1
  int64_t divisor;            // of every tile: T, or 1 for copies
  // forward
  const void* weight;  // (O, I)
  int64_t weight_stride;
  void* out;  // (down*O, across*I) contiguous
  // backward
  const void* grad_out;  // (down*O, across*I)
  int64_t grad_out_stride;
  void* grad_weight;  // (O, I) contiguous

  constexpr int64_t out_rows() const { return down * rows; }
  constexpr int64_t out_cols() const { return across * cols; }
  // From an element of grad_out to the same one of the next tile.
  constexpr int64_t next_tile() const {
    return (down > 1 ? rows * grad_out_stride : 0) + (across > 1 ? cols : 0);
  }
};

// Forward writes the rows [begin, end) of out, backward the elements [begin, end) of grad_weight,
// each once.
UHD_PER_ISA(void tile_weight_forward(const TileWeight& args, int64_t begin, int64_t end);
            void tile_weight_backward(const TileWeight& args, int64_t begin, int64_t end);)

// All rows; nullptr, or the text of an error.
namespace cuda {
const char* tile_weight_forward(const TileWeight& args, void* stream);
const char* tile_weight_backward(const TileWeight& args, void* stream);
}  // namespace cuda

}  // namespace uhd
