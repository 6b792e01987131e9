// SPDX-License-Identifier: Apache-2.0
// Sums of what lies at equal distances in memory: the tiles of a gradient, the partial sums of
// threads. For *_cpu.cpp files only.
#pragma once
#include "common/vec.h"

namespace uhd {
namespace {

// Adds up vectors in double: in float, the sum of a million equal terms is off by a percent.
template <class S>
struct WideSum;
template <>
struct WideSum<double> {
  Vec<double> sum = {};

  void add(Vec<double> v) { sum += v; }
  Vec<double> total() const { return sum; }
};
template <>
struct WideSum<float> {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Vec<double> low = {}, high = {};

  void add(Vec<float> v) {
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    low += __builtin_convertvector(half[0], Vec<double>);
    high += __builtin_convertvector(half[1], Vec<double>);
  }
  Vec<float> total() const {
    const Half half[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
    Vec<float> v;
    std::memcpy(&v, half, sizeof v);
    return v;
  }
};

// out[i] = (sum over t < terms of first[t * stride + i]) / divisor, for i < count.
template <class T>
void sum_strided(const T* first, int64_t stride, int64_t terms, AccumulateT<T> divisor,
                 int64_t count, T* out) {
  for_channels<T>(count, [&](int64_t i, auto load, auto store) {
    WideSum<AccumulateT<T>> sum;
    for (int64_t t = 0; t < terms; ++t) sum.add(load(first + t * stride + i));
    store(out + i, sum.total() / divisor);
  });
}

}  // namespace
}  // namespace uhd
