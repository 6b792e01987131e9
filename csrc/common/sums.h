// SPDX-License-Identifier: Apache-2.0
// Sums of what lies at equal distances in memory: the tiles of a gradient, the partial sums of
// threads. For *_cpu.cpp files only.
#pragma once
#include "common/blocked_sum.h"
#include "common/vec.h"

namespace uhd {
namespace {

// out[i] = (sum over t < terms of first[t * stride + i]) / divisor, for i < count.
template <class T>
void sum_strided(const T* first, int64_t stride, int64_t terms, AccumulateT<T> divisor,
                 int64_t count, T* out) {
  using V = Vec<AccumulateT<T>>;
  for_channels<T>(count, [&](int64_t i, auto load, auto store) {
    if (terms <= 32) {  // the few tiles of a weight: nothing to count for every vector
      V sum = {};
      for (int64_t t = 0; t < terms; ++t) sum += load(first + t * stride + i);
      return store(out + i, sum / divisor);
    }
    BlockedSum<V> sum;
    for (int64_t t = 0; t < terms; ++t) sum.add(load(first + t * stride + i));
    store(out + i, sum.total() / divisor);
  });
}

}  // namespace
}  // namespace uhd
