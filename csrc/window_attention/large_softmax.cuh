// SPDX-License-Identifier: Apache-2.0
// Softmax over the rows of a strip (large_products.cuh) that comes some columns at a time. A lane
// has two rows, half = 0 and 1; the four lanes of a row agree on its maximum.
#pragma once
#include "window_attention/large_products.cuh"

namespace uhd {
namespace {

UHD_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
UHD_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// The column of element i of tile n.
UHD_DEVICE int column_of(int n, int i) { return n * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Scores become exponents of two; columns from `count` on get no weight.
template <int kTiles>
UHD_DEVICE void scale_and_mask(float (&scores)[kTiles][4], float exponent_scale, int count) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = column_of(n, i) < count ? scores[n][i] * exponent_scale : -INFINITY;
    }
  }
}

// The maximum of each row so far, and this lane's part of the sum of 2^(exponent - maximum).
class OnlineSoftmax {
 public:
  // Takes in more columns. What was summed relative to the old maxima must be multiplied by
  // `correction`.
  template <int kTiles>
  UHD_DEVICE void see(const float (&exponents)[kTiles][4], float (&correction)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum_[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        largest = fmaxf(largest, fmaxf(exponents[n][2 * half], exponents[n][2 * half + 1]));
      }
      const float old = maximum_[half];
      maximum_[half] = quad_max(largest);
      correction[half] = exp2_approximate(old - base(half));
      sum_[half] *= correction[half];
    }
  }
  // The weight of a column, relative to the maximum.
  UHD_DEVICE float weigh(float exponent, int half) {
    const float weight = exp2_approximate(exponent - base(half));
    sum_[half] += weight;
    return weight;
  }

  // After the last column.
  UHD_DEVICE void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) sum_[half] = quad_sum(sum_[half]);
  }
  UHD_DEVICE float sum(int half) const { return sum_[half]; }
  // The normalised weight of a column is 2^(exponent - log2_sum).
  UHD_DEVICE float log2_sum(int half) const { return base(half) + log2f(sum_[half]); }

 private:
  // A row of nothing but -Inf so far has weights of zero, not of 2^(-Inf + Inf).
  UHD_DEVICE float base(int half) const {
    return maximum_[half] == -INFINITY ? 0.0f : maximum_[half];
  }

  float maximum_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {0.0f, 0.0f};
};

}  // namespace
}  // namespace uhd
