// SPDX-License-Identifier: Apache-2.0
// Forward: a thread rounds 16 bytes of quotients once and stores them in every tile. Backward: it
// sums 16 bytes over the tiles, in their order.
#include "common/tiles.cuh"
#include "tile_average/tile_average.h"

namespace uhd {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads) average_forward(const TileAverage args) {
  const AccumulateT<T> tiles = AccumulateT<T>(args.tiles);
  for_matrix(args.rows, args.cols / kWidth, [&](int64_t row, int64_t chunk) {
    const int64_t col = chunk * kWidth;
    const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride + col;
    T* out = static_cast<T*>(args.out) + row * args.tiles * args.cols + col;
    auto share = Elements<T, kWidth>::load(weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) share.value[i] /= tiles;
    for (int64_t t = 0; t < args.tiles; ++t) share.store(out + t * args.cols);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(TileTraits::kThreads) average_backward(const TileAverage args) {
  for_matrix(args.rows, args.cols / kWidth, [&](int64_t row, int64_t chunk) {
    const int64_t col = chunk * kWidth;
    sum_tiles<T, kWidth>(static_cast<const T*>(args.grad_out) + row * args.grad_out_stride + col,
                         args.cols, args.tiles, AccumulateT<T>(args.tiles),
                         static_cast<T*>(args.grad_weight) + row * args.cols + col);
  });
}

}  // namespace

namespace cuda {

const char* tile_average_forward(const TileAverage& args, void* stream) {
  const auto run = [&](auto x, auto width) {
    return launch(average_forward<decltype(x), width>, matrix_grid(args.rows, args.cols / width),
                  TileTraits::kThreads, 0, stream, args);
  };
  return with_width(args.dtype, args.cols, {{args.weight, args.weight_stride}}, run);
}

const char* tile_average_backward(const TileAverage& args, void* stream) {
  const auto run = [&](auto x, auto width) {
    return launch(average_backward<decltype(x), width>, matrix_grid(args.rows, args.cols / width),
                  TileTraits::kThreads, 0, stream, args);
  };
  return with_width(args.dtype, args.cols, {{args.grad_out, args.grad_out_stride}}, run);
}

}  // namespace cuda
}  // namespace uhd
