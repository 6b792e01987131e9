// SPDX-License-Identifier: Apache-2.0
// Forward: where a tile is a copy, a thread stores 16 bytes of the weight or of zeros, in one pass
// over the output; where it is a share, a thread rounds 16 bytes of quotients once and stores them
// in every tile. Backward: a thread sums 16 bytes over the tiles, in their order.
#include "common/elements.cuh"
#include "common/view_table.h"
#include "common/words.cuh"
#include "tile_weight/tile_weight.h"

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

// The sizes and strides of args are in words.
template <class Word>
__global__ void __launch_bounds__(TileTraits::kThreads) tile_copies(const TileWeight args) {
  const bool diagonal = args.down > 1 && args.across > 1;
  for_matrix(args.out_rows(), args.out_cols(), [&](int64_t out_row, int64_t out_col) {
    const int64_t below = out_row / args.rows;
    const int64_t row = out_row - below * args.rows;
    const int64_t col = diagonal ? out_col - below * args.cols : out_col;
    Word word{};  // all bits zero are 0.0 in every dtype
    if (0 <= col && col < args.cols) {
      word = static_cast<const Word*>(args.weight)[row * args.weight_stride + col];
    }
    static_cast<Word*>(args.out)[out_row * args.out_cols() + out_col] = word;
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads) tile_shares(const TileWeight args) {
  const AccumulateT<T> divisor = AccumulateT<T>(args.divisor);
  for_matrix(args.rows, args.cols / kWidth, [&](int64_t row, int64_t chunk) {
    const int64_t col = chunk * kWidth;
    const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride + col;
    T* out = static_cast<T*>(args.out) + row * args.out_cols() + col;
    auto share = Elements<T, kWidth>::load(weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) share.value[i] /= divisor;
    for (int64_t t = 0; t < args.tiles; ++t) share.store(out + t * args.cols);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads) tile_sums(const TileWeight args) {
  const AccumulateT<T> divisor = AccumulateT<T>(args.divisor);
  const int64_t next_tile = args.next_tile();
  for_matrix(args.rows, args.cols / kWidth, [&](int64_t row, int64_t chunk) {
    const int64_t col = chunk * kWidth;
    const T* tile = static_cast<const T*>(args.grad_out) + row * args.grad_out_stride + col;
    // Float32 would drift over many tiles; sums of blocks, as on the CPU, need too many registers.
    double sum[kWidth] = {};
#pragma unroll 4  // loads in flight; the additions stay in order
    for (int64_t t = 0; t < args.tiles; ++t, tile += next_tile) {
      const auto grad = Elements<T, kWidth>::load(tile);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += double(grad.value[i]);
    }
    Elements<T, kWidth> grad_weight;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad_weight.value[i] = AccumulateT<T>(sum[i]) / divisor;
    grad_weight.store(static_cast<T*>(args.grad_weight) + row * args.cols + col);
  });
}

}  // namespace

namespace cuda {

const char* tile_weight_forward(const TileWeight& args, void* stream) {
  const Rows weight{args.weight, args.weight_stride};
  if (args.divisor > 1) {
    return with_width(args.dtype, args.cols, {weight}, [&](auto x, auto width) {
      return launch(tile_shares<decltype(x), width>, matrix_grid(args.rows, args.cols / width),
                    TileTraits::kThreads, 0, stream, args);
    });
  }
  return with_word(args.dtype, args.cols, {weight}, [&](auto word, int64_t elements) {
    TileWeight in_words = args;
    in_words.cols /= elements;
    in_words.weight_stride /= elements;
    return launch(tile_copies<decltype(word)>,
                  matrix_grid(in_words.out_rows(), in_words.out_cols()), TileTraits::kThreads, 0,
                  stream, in_words);
  });
}

const char* tile_weight_backward(const TileWeight& args, void* stream) {
  const Rows grad_out{args.grad_out, args.grad_out_stride};
  return with_width(args.dtype, args.cols, {grad_out}, [&](auto x, auto width) {
    return launch(tile_sums<decltype(x), width>, matrix_grid(args.rows, args.cols / width),
                  TileTraits::kThreads, 0, stream, args);
  });
}

}  // namespace cuda
}  // namespace uhd
