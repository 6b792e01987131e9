// SPDX-License-Identifier: Apache-2.0
// Copies: they move words, not elements, so that every bit stays as it is and a kernel is compiled
// once for all element types.
#pragma once
#include "common/elements.cuh"

namespace uhd {
namespace {

// One integer, because nvcc may move the members of a struct one by one.
using Word16 = unsigned __int128;

// Calls function(word, elements) for kernels that copy rows of `channels` elements: the widest
// word, of at most 16 bytes, that all rows, and rows of a contiguous tensor, can be moved in, and
// the number of elements that it holds. Returns what function does.
template <class Function>
inline const char* with_word(DType dtype, int64_t channels, std::initializer_list<Rows> tensors,
                             Function&& function) {
  const int64_t size = element_size(dtype);
  uint64_t bytes = static_cast<uint64_t>(channels * size);  // or'ed: a multiple of what all are
  for (const Rows& rows : tensors) {
    bytes |= reinterpret_cast<uintptr_t>(rows.pointer) | static_cast<uint64_t>(rows.stride * size);
  }
  if (bytes % 16 == 0) return function(Word16{}, 16 / size);
  if (bytes % 8 == 0) return function(uint64_t{}, 8 / size);
  if (bytes % 4 == 0) return function(uint32_t{}, 4 / size);
  return function(uint16_t{}, 2 / size);
}

}  // namespace
}  // namespace uhd
