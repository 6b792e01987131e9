// SPDX-License-Identifier: Apache-2.0
// A weight repeated along its inputs and divided by the number of tiles. No torch here.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace uhd {

// O rows of I inputs, T tiles. Rows are contiguous; strides between rows in elements, not bytes.
struct TileAverage {
  DType dtype;
  int64_t tiles, rows, cols;  // T, O, I
  // forward
  const void* weight;  // (O, I)
  int64_t weight_stride;
  void* out;  // (O, T*I) contiguous
  // backward
  const void* grad_out;  // (O, T*I)
  int64_t grad_out_stride;
  void* grad_weight;  // (O, I) contiguous
};

// Forward writes the rows [begin, end) of out, backward those of grad_weight, every element once.
UHD_PER_ISA(void tile_average_forward(const TileAverage& args, int64_t begin, int64_t end);
            void tile_average_backward(const TileAverage& args, int64_t begin, int64_t end);)

// All rows; nullptr, or the text of an error.
namespace cuda {
const char* tile_average_forward(const TileAverage& args, void* stream);
const char* tile_average_backward(const TileAverage& args, void* stream);
}  // namespace cuda

}  // namespace uhd
