// SPDX-License-Identifier: Apache-2.0
#include "common/sums.h"
#include "tile_weight/tile_weight.h"

namespace uhd {
namespace UHD_ISA {

void tile_weight_forward(const TileWeight& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    using S = AccumulateT<T>;
    const size_t tile_bytes = static_cast<size_t>(args.cols) * sizeof(T);
    const bool diagonal = args.down > 1 && args.across > 1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t below = i / args.rows, row = i % args.rows;
      // The tiles [first, last) of this row hold the weight, the others zeros.
      const int64_t first = diagonal ? below : 0, last = diagonal ? below + 1 : args.across;
      const T* weight = static_cast<const T*>(args.weight) + row * args.weight_stride;
      T* out = static_cast<T*>(args.out) + i * args.out_cols();
      T* tile = out + first * args.cols;
      // All bits zero are 0.0 in every dtype.
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(first) * tile_bytes);
      if (args.divisor == 1) {
        std::memcpy(tile, weight, tile_bytes);
      } else {
        for_channels<T>(args.cols, [&](int64_t c, auto load, auto store) {
          store(tile + c, load(weight + c) / static_cast<S>(args.divisor));
        });
      }
      for (int64_t t = first + 1; t < last; ++t) std::memcpy(out + t * args.cols, tile, tile_bytes);
      std::memset(static_cast<void*>(out + last * args.cols), 0,
                  static_cast<size_t>(args.across - last) * tile_bytes);
    }
  });
}

void tile_weight_backward(const TileWeight& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / args.cols, col = i % args.cols;
      const int64_t left = args.cols - col, count = left < end - i ? left : end - i;
      sum_strided(static_cast<const T*>(args.grad_out) + row * args.grad_out_stride + col,
                  args.next_tile(), args.tiles, static_cast<AccumulateT<T>>(args.divisor), count,
                  static_cast<T*>(args.grad_weight) + i);
      i += count;
    }
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
