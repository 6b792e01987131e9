// SPDX-License-Identifier: Apache-2.0
// Sums of what lies at equal distances in memory: the tiles of a gradient, the partial sums of
// threads. For *_cpu.cpp files only.
#pragma once
#include <type_traits>

#include "common/vec.h"

namespace uhd {
namespace {

// The sum of vectors, in blocks of 32 terms, 32 blocks, and so on: one after the other, a million
// equal terms are off by a percent in float.
template <int kLevel, class T, class Load>
inline Vec<AccumulateT<T>> sum_blocks(const T* first, int64_t stride, int64_t terms,
                                      const Load& load) {
  constexpr int64_t block = int64_t{1} << 5 * kLevel;
  Vec<AccumulateT<T>> sum = {};
  for (int64_t t = 0; t < terms; t += block) {
    const T* next = first + t * stride;
    if constexpr (kLevel == 0) {
      sum += load(next);
    } else {
      const int64_t left = terms - t;
      sum += sum_blocks<kLevel - 1>(next, stride, left < block ? left : block, load);
    }
  }
  return sum;
}

// out[i] = (sum over t < terms of first[t * stride + i]) / divisor, for i < count.
template <class T>
void sum_strided(const T* first, int64_t stride, int64_t terms, AccumulateT<T> divisor,
                 int64_t count, T* out) {
  const auto run = [&](auto level) {
    for_channels<T>(count, [&](int64_t i, auto load, auto store) {
      store(out + i, sum_blocks<level>(first + i, stride, terms, load) / divisor);
    });
  };
  // The few tiles of a weight are one block: no loop over blocks for every vector.
  terms <= 32 ? run(std::integral_constant<int, 0>{}) : run(std::integral_constant<int, 3>{});
}

}  // namespace
}  // namespace uhd
