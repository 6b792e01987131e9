// SPDX-License-Identifier: Apache-2.0
// Matrix products of one warp on rows in shared memory. A strip of scores or weights is 16 rows by
// kTiles * 8 columns in the layout of a tensor core's C: lane / 4 (+ 8) is the row, tile n holds
// the columns 8 n + lane % 4 * 2 + {0, 1}.
#pragma once
#include "window_attention/large_rows.cuh"

namespace uhd {
namespace {

// scores[i][j] = row i . column j. Columns come 16 at a time; of the last 16 those from `count` on
// must be readable, and blocks of 16 beyond it stay zero.
template <class T, int kDim, int kTiles>
UHD_DEVICE void row_products(float (&scores)[kTiles][4], const T* rows, const T* columns,
                             int count) {
  constexpr int kStride = Row<kDim>::kStride, kSteps = kDim / 16;
  const int lane = threadIdx.x % kWarp;
  const T* row = rows + lane % 16 * kStride;
  const T* column = columns + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[4];
    ldmatrix_x4(a, row + k * 16 + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n * 8 >= count) break;
      uint32_t b[4];
      ldmatrix_x4(b, column + n * 8 * kStride + k * 16);
      mma_16x8x16<T>(scores[n], a, {b[0], b[1]});
      mma_16x8x16<T>(scores[n + 1], a, {b[2], b[3]});
    }
  }
  if constexpr (kDim % 16 == 8) {
    uint32_t a[2];
    ldmatrix_x2(a, row + kSteps * 16);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n * 8 >= count) break;
      uint32_t b[2];
      ldmatrix_x2(b, columns + (n * 8 + lane % 16) * kStride + kSteps * 16);
      mma_16x8x8<T>(scores[n], a, b[0]);
      mma_16x8x8<T>(scores[n + 1], a, b[1]);
    }
  }
}

// float32 numbers as the sum of two halves. The tensor core takes halves, but weights rounded to
// halves would cost more accuracy than the rounding of the result does; the sum of two is good to
// 2^-17 for BFloat16 and 2^-22 for Float16. The price is a second product, and NaN where
// a column is infinite, because low parts may be zero or negative.
template <class T>
struct SplitWeights {
  uint32_t high[4], low[4];

  // Tiles `left` and `right` of a strip are the 16 x 16 matrix of an A fragment.
  UHD_DEVICE SplitWeights(const float (&left)[4], const float (&right)[4]) {
    split(left[0], left[1], 0);
    split(left[2], left[3], 1);
    split(right[0], right[1], 2);
    split(right[2], right[3], 3);
  }

 private:
  UHD_DEVICE void split(float x, float y, int i) {
    high[i] = narrow_pair<T>(x, y);
    low[i] = narrow_pair<T>(x - low_half<T>(high[i]), y - high_half<T>(high[i]));
  }
};

// Weights of a softmax are at most about 1. Float16 has few digits left for those of an unlikely
// key, so they are brought up before they become halves, and the sums down afterwards.
template <class T>
constexpr float kWeightsUp = std::is_same_v<T, Float16> ? 0x1p14f : 1.0f;
template <class T>
constexpr float kWeightsDown = 1.0f / kWeightsUp<T>;

// sums[i] += sum of weights[i][j] * column j, over the columns below `count`, 16 at a time: of the
// last 16 the weights from `count` on must be zero, and the columns finite.
template <class T, int kDim, int kTiles>
UHD_DEVICE void add_weighted(float (&sums)[kDim / 8][4], const float (&weights)[kTiles][4],
                             const T* columns, int count) {
  constexpr int kStride = Row<kDim>::kStride, kChunks = Row<kDim>::kChunks;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n * 8 >= count) break;
    const SplitWeights<T> a(weights[n], weights[n + 1]);
    const T* column = columns + (n * 8 + lane % 16) * kStride;
#pragma unroll
    for (int c = 0; c + 1 < kChunks; c += 2) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, column + (c + lane / 16) * 8);
      mma_16x8x16<T>(sums[c], a.low, {b[0], b[1]});
      mma_16x8x16<T>(sums[c + 1], a.low, {b[2], b[3]});
      mma_16x8x16<T>(sums[c], a.high, {b[0], b[1]});
      mma_16x8x16<T>(sums[c + 1], a.high, {b[2], b[3]});
    }
    if constexpr (kChunks % 2 == 1) {
      uint32_t b[2];
      ldmatrix_x2_transposed(b, column + (kChunks - 1) * 8);
      mma_16x8x16<T>(sums[kChunks - 1], a.low, b);
      mma_16x8x16<T>(sums[kChunks - 1], a.high, b);
    }
  }
}

}  // namespace
}  // namespace uhd
