// SPDX-License-Identifier: Apache-2.0
// Gradient of a weight that was laid out several times: the sum over its tiles. For *_cpu.cpp files
// only.
#pragma once
#include "common/vec.h"

namespace uhd {
namespace {

// out[i] = (sum over t < tiles of first[t * tile_stride + i]) / divisor, for i < count.
template <class T>
void sum_tiles(const T* first, int64_t tile_stride, int64_t tiles, AccumulateT<T> divisor,
               int64_t count, T* out) {
  using S = AccumulateT<T>;
  for_channels<T>(count, [&](int64_t i, auto load, auto store) {
    Vec<S> sum = {};
    for (int64_t t = 0; t < tiles; ++t) sum += load(first + t * tile_stride + i);
    store(out + i, sum / divisor);
  });
}

}  // namespace
}  // namespace uhd
