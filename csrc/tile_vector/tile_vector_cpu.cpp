// SPDX-License-Identifier: Apache-2.0
#include "common/tiles.h"
#include "tile_vector/tile_vector.h"

namespace uhd {
namespace UHD_ISA {

void tile_vector_forward(const TileVector& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t tile = begin; tile < end; ++tile) {
      std::memcpy(static_cast<T*>(args.out) + tile * args.size, args.vector,
                  static_cast<size_t>(args.size) * sizeof(T));
    }
  });
}

void tile_vector_backward(const TileVector& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    sum_tiles(static_cast<const T*>(args.grad_out) + begin, args.size, args.tiles,
              AccumulateT<T>(1), end - begin, static_cast<T*>(args.grad_vector) + begin);
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
