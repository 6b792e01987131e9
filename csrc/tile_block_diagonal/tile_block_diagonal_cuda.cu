// SPDX-License-Identifier: Apache-2.0
// Forward: a thread stores 16 bytes, of the weight or of zeros: one pass over the output. Backward:
// it sums 16 bytes over the blocks of the diagonal, in their order.
#include "common/tiles.cuh"
#include "common/words.cuh"
#include "tile_block_diagonal/tile_block_diagonal.h"

namespace uhd {
namespace {

// The sizes and strides of args are in words.
template <class Word>
__global__ void __launch_bounds__(TileTraits::kThreads)
    block_diagonal_forward(const TileBlockDiagonal args) {
  const int64_t width = args.tiles * args.cols;
  for_matrix(args.tiles * args.rows, width, [&](int64_t out_row, int64_t out_col) {
    const int64_t tile = out_row / args.rows;
    const int64_t row = out_row - tile * args.rows, col = out_col - tile * args.cols;
    Word word{};  // all bits zero are 0.0 in every dtype
    if (0 <= col && col < args.cols) {
      word = static_cast<const Word*>(args.weight)[row * args.weight_stride + col];
    }
    static_cast<Word*>(args.out)[out_row * width + out_col] = word;
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads)
    block_diagonal_backward(const TileBlockDiagonal args) {
  const int64_t next_block = args.rows * args.grad_out_stride + args.cols;
  for_matrix(args.rows, args.cols / kWidth, [&](int64_t row, int64_t chunk) {
    const int64_t col = chunk * kWidth;
    sum_tiles<T, kWidth>(static_cast<const T*>(args.grad_out) + row * args.grad_out_stride + col,
                         next_block, args.tiles, AccumulateT<T>(1),
                         static_cast<T*>(args.grad_weight) + row * args.cols + col);
  });
}

}  // namespace

namespace cuda {

const char* tile_block_diagonal_forward(const TileBlockDiagonal& args, void* stream) {
  const auto run = [&](auto word, int64_t elements) {
    TileBlockDiagonal in_words = args;
    in_words.cols /= elements;
    in_words.weight_stride /= elements;
    return launch(block_diagonal_forward<decltype(word)>,
                  matrix_grid(args.tiles * args.rows, args.tiles * in_words.cols),
                  TileTraits::kThreads, 0, stream, in_words);
  };
  return with_word(args.dtype, args.cols, {{args.weight, args.weight_stride}}, run);
}

const char* tile_block_diagonal_backward(const TileBlockDiagonal& args, void* stream) {
  const auto run = [&](auto x, auto width) {
    return launch(block_diagonal_backward<decltype(x), width>,
                  matrix_grid(args.rows, args.cols / width), TileTraits::kThreads, 0, stream, args);
  };
  return with_width(args.dtype, args.cols, {{args.grad_out, args.grad_out_stride}}, run);
}

}  // namespace cuda
}  // namespace uhd
