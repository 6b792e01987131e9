// SPDX-License-Identifier: Apache-2.0
// The backward pass of one warp's strip. With P the weights of the softmax and
//   dP_ij = grad_out_i . v_j,   delta_i = sum_j P_ij dP_ij,   dS_ij = P_ij (dP_ij - delta_i)
// the gradients are
//   grad_q_i = scale sum_j dS_ij k_j,   grad_k_j = scale sum_i dS_ij q_i,
//   grad_v_j = sum_i P_ij grad_out_i.
// A strip of queries gives grad_q and the statistics of its rows; with these a strip of keys gives
// grad_k and grad_v. Both compute P and dP anew: nothing is added up between warps.
#pragma once
#include "window_attention/large_softmax.cuh"

namespace uhd {
namespace {

struct GradientTraits {
  // Keys at a time for a strip of queries, which needs the registers of two strips of scores and
  // one gradient, and queries at a time for a strip of keys: two strips of scores, two gradients.
  static constexpr int kKeyTiles = 4, kQueryTiles = 4;
};

// What the strips of keys need to know about each query, in shared memory.
struct QueryStatistics {
  float* log2_sum;  // P_ij = 2^(exponent_ij - log2_sum)
  float* delta;
  float* magnitude;  // largest |dP_ij|
};

// dS must fit a half type, whatever the size of the gradients: powers of two that bring numbers up
// to `largest` below 2^14, so that a difference of two stays below 2^15, and back.
struct Range {
  float up, down;
  UHD_DEVICE explicit Range(float largest) {
    const unsigned exponent = max(__float_as_uint(largest) >> 23, 14u);  // biased by 127
    up = __uint_as_float((267 - exponent) << 23);
    down = __uint_as_float((exponent - 13) << 23);
  }
};

template <int kCount>
UHD_DEVICE void clear(float (&sums)[kCount][4]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c][i] = 0.0f;
  }
}

// The largest of numbers in shared memory that are not negative, the same in each lane.
UHD_DEVICE float largest_of(const float* numbers, int count) {
  float largest = 0.0f;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) largest = fmaxf(largest, numbers[i]);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
  }
  return largest;
}

// A strip of queries against some keys.
template <class T, int kDim>
struct QueryScores {
  static constexpr int kTiles = GradientTraits::kKeyTiles;
  float exponents[kTiles][4], grad_weights[kTiles][4];

  // Of the `count` keys that k and v begin with.
  UHD_DEVICE void compute(const T* q, const T* grad_out, const T* k, const T* v, int count,
                          float exponent_scale) {
    row_products<T, kDim>(exponents, q, k, count);
    scale_and_mask(exponents, exponent_scale, count);
    row_products<T, kDim>(grad_weights, grad_out, v, count);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column_of(n, i) >= count) grad_weights[n][i] = 0.0f;
      }
    }
  }
};

// The statistics of the rows of a strip of queries.
class GradientSums {
 public:
  template <int kTiles>
  UHD_DEVICE void see(const float (&exponents)[kTiles][4], const float (&grad_weights)[kTiles][4]) {
    float correction[2];
    softmax_.see(exponents, correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) delta_[half] *= correction[half];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        delta_[half] += softmax_.weigh(exponents[n][i], half) * grad_weights[n][i];
        magnitude_[half] = fmaxf(magnitude_[half], fabsf(grad_weights[n][i]));
      }
    }
  }
  UHD_DEVICE void finish() {
    softmax_.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta_[half] = quad_sum(delta_[half]) / softmax_.sum(half);
      magnitude_[half] = quad_max(magnitude_[half]);
    }
  }
  UHD_DEVICE float log2_sum(int half) const { return softmax_.log2_sum(half); }
  UHD_DEVICE float delta(int half) const { return delta_[half]; }
  UHD_DEVICE float magnitude(int half) const { return magnitude_[half]; }

  // Writes the rows to the statistics of all queries, from the begin-th on.
  UHD_DEVICE void store(const QueryStatistics& statistics, int begin) const {
    const int lane = threadIdx.x % kWarp;
    if (lane % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = begin + lane / 4 + 8 * half;
      statistics.log2_sum[row] = log2_sum(half);
      statistics.delta[row] = delta(half);
      statistics.magnitude[row] = magnitude(half);
    }
  }

 private:
  OnlineSoftmax softmax_;
  float delta_[2] = {0.0f, 0.0f}, magnitude_[2] = {0.0f, 0.0f};
};

// grad_q of 16 queries, each row to be multiplied by `factor` and the scale.
template <class T, int kDim>
UHD_DEVICE GradientSums query_gradient(const T* q, const T* grad_out, const T* k, const T* v,
                                       int tokens, float exponent_scale,
                                       float (&grad_q)[kDim / 8][4], float (&factor)[2]) {
  using Scores = QueryScores<T, kDim>;
  constexpr int kStride = Row<kDim>::kStride, kKeys = Scores::kTiles * 8;
  Scores scores;
  GradientSums sums;
  int begin = 0;
#pragma unroll 1
  for (;; begin += kKeys) {
    scores.compute(q, grad_out, k + begin * kStride, v + begin * kStride, tokens - begin,
                   exponent_scale);
    sums.see(scores.exponents, scores.grad_weights);
    if (begin + kKeys >= tokens) break;
  }
  sums.finish();
  const Range range[2] = {Range(sums.magnitude(0)), Range(sums.magnitude(1))};
  clear(grad_q);
#pragma unroll 1
  for (;;) {  // backwards, because the scores of the last keys are still there
    float grad_scores[Scores::kTiles][4];
#pragma unroll
    for (int n = 0; n < Scores::kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2;
        const float up = range[half].up;
        grad_scores[n][i] = exp2_approximate(scores.exponents[n][i] - sums.log2_sum(half)) *
                            fmaf(scores.grad_weights[n][i], up, -sums.delta(half) * up);
      }
    }
    add_weighted<T, kDim>(grad_q, grad_scores, k + begin * kStride, tokens - begin);
    if (begin == 0) break;
    begin -= kKeys;
    scores.compute(q, grad_out, k + begin * kStride, v + begin * kStride, tokens - begin,
                   exponent_scale);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) factor[half] = range[half].down;
  return sums;
}

// grad_k and grad_v of 16 keys; grad_k is to be multiplied by the scale and range.down, grad_v by
// kWeightsDown.
template <class T, int kDim>
UHD_DEVICE void key_gradients(const T* k, const T* v, const T* q, const T* grad_out, int tokens,
                              float exponent_scale, const QueryStatistics& statistics,
                              const Range& range, float (&grad_k)[kDim / 8][4],
                              float (&grad_v)[kDim / 8][4]) {
  constexpr int kStride = Row<kDim>::kStride, kTiles = GradientTraits::kQueryTiles;
  clear(grad_k);
  clear(grad_v);
#pragma unroll 1
  for (int begin = 0; begin < tokens; begin += kTiles * 8) {
    const int count = tokens - begin;
    float weights[kTiles][4], grad_scores[kTiles][4];
    row_products<T, kDim>(weights, k, q + begin * kStride, count);
    row_products<T, kDim>(grad_scores, v, grad_out + begin * kStride, count);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = column_of(n, i);
        const int present = begin + min(query, count - 1);
        const float weight =
            exp2_approximate(weights[n][i] * exponent_scale - statistics.log2_sum[present]);
        const float grad_score =
            weight * fmaf(grad_scores[n][i], range.up, -statistics.delta[present] * range.up);
        weights[n][i] = query < count ? weight * kWeightsUp<T> : 0.0f;
        grad_scores[n][i] = query < count ? grad_score : 0.0f;
      }
    }
    add_weighted<T, kDim>(grad_v, weights, grad_out + begin * kStride, count);
    add_weighted<T, kDim>(grad_k, grad_scores, q + begin * kStride, count);
  }
}

}  // namespace
}  // namespace uhd
