// SPDX-License-Identifier: Apache-2.0
// What the operators that lay a weight out several times share. For *_cuda.cu files only.
#pragma once
#include "common/elements.cuh"
#include "common/view_table.h"

namespace uhd {
namespace {

struct TileTraits {
  // Rows of weights are a few hundred 16-byte words long; a small block wastes few threads at
  // their end.
  static constexpr int kThreads = 128;
};

// The grid for a kernel that walks a matrix with for_matrix.
inline dim3 matrix_grid(int64_t rows, int64_t cols) {
  const int64_t across = ceil_div(cols, TileTraits::kThreads);
  return dim3(static_cast<unsigned>(rows < INT32_MAX ? rows : INT32_MAX),
              static_cast<unsigned>(across < 65535 ? across : 65535));
}

// Calls body(row, col) for every place of a matrix, each in one thread of the grid. The loops are
// for matrices beyond the largest grid; else a thread has one place.
template <class Body>
UHD_DEVICE void for_matrix(int64_t rows, int64_t cols, Body&& body) {
  const int64_t first = int64_t(blockIdx.y) * TileTraits::kThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.y) * TileTraits::kThreads;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    for (int64_t col = first; col < cols; col += step) body(row, col);
  }
}

// out = (sum over t < tiles of first[t * tile_stride]) / divisor, kWidth neighbours at once.
template <class T, int kWidth>
UHD_DEVICE void sum_tiles(const T* first, int64_t tile_stride, int64_t tiles,
                          AccumulateT<T> divisor, T* out) {
  Elements<T, kWidth> sum = Elements<T, kWidth>::zero();
#pragma unroll 4  // loads in flight; the additions stay in order
  for (int64_t t = 0; t < tiles; ++t) {
    const auto tile = Elements<T, kWidth>::load(first + t * tile_stride);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum.value[i] += tile.value[i];
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum.value[i] /= divisor;
  sum.store(out);
}

}  // namespace
}  // namespace uhd
