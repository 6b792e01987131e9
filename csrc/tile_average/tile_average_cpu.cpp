// SPDX-License-Identifier: Apache-2.0
#include "common/tiles.h"
#include "tile_average/tile_average.h"

namespace uhd {
namespace UHD_ISA {

void tile_average_forward(const TileAverage& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    using S = AccumulateT<T>;
    const size_t tile_bytes = static_cast<size_t>(args.cols) * sizeof(T);
    for (int64_t row = begin; row < end; ++row) {
      const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
      T* out = static_cast<T*>(args.out) + row * args.tiles * args.cols;
      for_channels<T>(args.cols, [&](int64_t i, auto load, auto store) {
        store(out + i, load(weight + i) / static_cast<S>(args.tiles));
      });
      for (int64_t t = 1; t < args.tiles; ++t) std::memcpy(out + t * args.cols, out, tile_bytes);
    }
  });
}

void tile_average_backward(const TileAverage& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t row = begin; row < end; ++row) {
      sum_tiles(static_cast<const T*>(args.grad_out) + row * args.grad_out_stride, args.cols,
                args.tiles, static_cast<AccumulateT<T>>(args.tiles), args.cols,
                static_cast<T*>(args.grad_weight) + row * args.cols);
    }
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
