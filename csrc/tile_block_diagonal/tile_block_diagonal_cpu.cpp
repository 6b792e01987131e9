// SPDX-License-Identifier: Apache-2.0
#include "common/tiles.h"
#include "tile_block_diagonal/tile_block_diagonal.h"

namespace uhd {
namespace UHD_ISA {

void tile_block_diagonal_forward(const TileBlockDiagonal& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const size_t tile_bytes = static_cast<size_t>(args.cols) * sizeof(T);
    const int64_t width = args.tiles * args.cols;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = i / args.rows, row = i % args.rows;
      T* out = static_cast<T*>(args.out) + i * width;
      T* block = out + tile * args.cols;
      // All bits zero are 0.0 in every dtype.
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(tile) * tile_bytes);
      std::memcpy(block, static_cast<const T*>(args.weight) + row * args.weight_stride, tile_bytes);
      std::memset(static_cast<void*>(block + args.cols), 0,
                  static_cast<size_t>(args.tiles - 1 - tile) * tile_bytes);
    }
  });
}

void tile_block_diagonal_backward(const TileBlockDiagonal& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t next_block = args.rows * args.grad_out_stride + args.cols;
    for (int64_t row = begin; row < end; ++row) {
      sum_tiles(static_cast<const T*>(args.grad_out) + row * args.grad_out_stride, next_block,
                args.tiles, AccumulateT<T>(1), args.cols,
                static_cast<T*>(args.grad_weight) + row * args.cols);
    }
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
