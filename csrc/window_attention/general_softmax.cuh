// SPDX-License-Identifier: Apache-2.0
// The softmax of the general kernel, in the accumulation type.
#pragma once
#include <cmath>

#include "common/elements.cuh"

namespace uhd {
namespace {

// The softmax of scores that arrive a few at a time.
template <class T>
struct OnlineSoftmax {
  using S = AccumulateT<T>;
  S largest = -S(INFINITY);
  S sum = 0;  // of exp(score - largest)

  // e^x for x <= 0. For half types, whose rounding is far above the error of the instruction, 2^x.
  UHD_DEVICE static S exp(S x) {
    if constexpr (sizeof(T) == 2) {
      return exp2_approximate(x * S(1.4426950408889634));
    } else {
      return std::exp(x);
    }
  }
  // A score of -inf has no weight even where it is the largest so far.
  UHD_DEVICE static S weight(S score, S largest) {
    return score == -S(INFINITY) ? S(0) : exp(score - largest);
  }
  // Replaces scores by their weights exp(score - largest); returns the factor for earlier weights.
  template <int n>
  UHD_DEVICE S add(S (&scores)[n]) {
    const S before = largest;
#pragma unroll
    for (int i = 0; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;  // no NaN
    const S factor = before == largest ? S(1) : exp(before - largest);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      scores[i] = weight(scores[i], largest);
      sum += scores[i];
    }
    return factor;
  }
};

}  // namespace
}  // namespace uhd
