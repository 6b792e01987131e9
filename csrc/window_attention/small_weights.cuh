// SPDX-License-Identifier: Apache-2.0
// Squares over the slots of a tile as operands of the tensor cores.
#pragma once
#include "window_attention/small_windows.cuh"

namespace uhd {
namespace {

// A square as the left operand: the sum of two halves each, which carries twice the digits of one.
// One alone would make an error as large as that of the stored result, several times over.
template <class T>
struct Weights {
  uint32_t high[4], low[4];

  Weights() = default;
  // Rows r of the square are multiplied by factor[r].
  UHD_DEVICE Weights(const Square& square, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = square[i / 2][i % 2 * 2], y = square[i / 2][i % 2 * 2 + 1];
      if constexpr (std::is_same_v<T, Float16>) x *= factor[i % 2], y *= factor[i % 2];
      high[i] = narrow_pair<T>(x, y);
      low[i] = narrow_pair<T>(x - low_half<T>(high[i]), y - high_half<T>(high[i]));
    }
  }

  UHD_DEVICE Weights transposed() const {
    Weights result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = i % 2 * 2 + i / 2;
      result.high[i] = movmatrix(high[from]);
      result.low[i] = movmatrix(low[from]);
    }
    return result;
  }
};

// Float16 has few exponents: weights are brought near its largest ones by powers of two, `factor`,
// and results back by `inverse`, for each of this lane's rows. BFloat16 needs none of it.
struct RowScale {
  float factor[2], inverse[2];
};

// Of probabilities, which are at most 1.
UHD_DEVICE RowScale probability_scale() { return {{0x1p14f, 0x1p14f}, {0x1p-14f, 0x1p-14f}}; }

// One for each window, after its largest element: another window must not change its bits.
UHD_DEVICE RowScale window_scale(const Square& square, const SmallTile& tile) {
  float largest[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    largest[r] = row_max(fmaxf(fmaxf(fabsf(square[0][2 * r]), fabsf(square[0][2 * r + 1])),
                               fmaxf(fabsf(square[1][2 * r]), fabsf(square[1][2 * r + 1]))));
    for (int rows = 1; rows < 8 && rows < 1 << tile.shift; rows *= 2) {
      largest[r] = fmaxf(largest[r], __shfl_xor_sync(kFullWarp, largest[r], 4 * rows));
    }
  }
  if (tile.shift == 4) largest[0] = largest[1] = fmaxf(largest[0], largest[1]);
  RowScale scale;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // An exponent e becomes 2^13; float holds both powers for any e from 14 on.
    const uint32_t e = max(__float_as_uint(largest[r]) >> 23, 14u);
    scale.factor[r] = __uint_as_float((267 - e) << 23);
    scale.inverse[r] = __uint_as_float((e - 13) << 23);
  }
  return scale;
}

}  // namespace
}  // namespace uhd
