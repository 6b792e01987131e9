// SPDX-License-Identifier: Apache-2.0
// A vector repeated end to end. No torch here.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace uhd {

struct TileVector {
  DType dtype;
  int64_t tiles, size;  // T, I
  // forward
  const void* vector;  // (I,) contiguous
  void* out;           // (T*I,) contiguous
  // backward
  const void* grad_out;  // (T*I,) contiguous
  void* grad_vector;     // (I,) contiguous
};

// Forward writes the tiles [begin, end) of out, backward the elements [begin, end) of grad_vector,
// each once.
UHD_PER_ISA(void tile_vector_forward(const TileVector& args, int64_t begin, int64_t end);
            void tile_vector_backward(const TileVector& args, int64_t begin, int64_t end);)

// All elements; nullptr, or the text of an error.
namespace cuda {
const char* tile_vector_forward(const TileVector& args, void* stream);
const char* tile_vector_backward(const TileVector& args, void* stream);
}  // namespace cuda

}  // namespace uhd
