// SPDX-License-Identifier: Apache-2.0
// 4 x 4 tiles of query and key tokens: products, softmax, and mixtures of four rows. For *_cpu.cpp
// files only.
//
// Vectors run along the channels of a head. kDim is the head size when it is known at compile time,
// else 0.
#pragma once
#include <utility>

#include "common/vec.h"

namespace uhd {
namespace {

constexpr int kTile = 4;

template <class S>
struct Tile {
  alignas(64) S at[kTile][kTile];
};

// ---- sums over lanes

template <class S, int kHalf, int... kLane>
inline Vec<S> add_halves(Vec<S> a, Vec<S> b, std::integer_sequence<int, kLane...>) {
  using Mask = typename VecOf<S>::mask;
  constexpr int lanes = kLanes<S>;
  // Lane l takes segment l / (2 kHalf) of a or b, whichever (l / kHalf) % 2 says.
  constexpr Mask low = {
      (kLane / kHalf % 2 * lanes + kLane / (2 * kHalf) * 2 * kHalf + kLane % kHalf)...};
  constexpr Mask high = {
      (kLane / kHalf % 2 * lanes + kLane / (2 * kHalf) * 2 * kHalf + kLane % kHalf + kHalf)...};
#ifdef __clang__  // has the indices as arguments alone, which g++ has from 12 on
  return __builtin_shufflevector(a, b, low[kLane]...) +
         __builtin_shufflevector(a, b, high[kLane]...);
#else
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// Each round adds the two halves of every segment of two vectors and packs the sums into one
// vector; after log2(lanes) rounds lane l of the first vector holds the sum of vector l.
template <class S, int kHalf = kLanes<S> / 2>
inline void sum_lanes(Vec<S>* acc) {
  for (int i = 0; i < kHalf; ++i) {
    acc[i] =
        add_halves<S, kHalf>(acc[i], acc[i + kHalf], std::make_integer_sequence<int, kLanes<S>>{});
  }
  if constexpr (kHalf > 1) sum_lanes<S, kHalf / 2>(acc);
}

// ---- products

// out[i][j] = scale * (a_i . b_j). With 16 registers there is room for two rows of accumulators,
// with 32 for four.
template <class T, int kDim, class S = AccumulateT<T>>
inline void dot_tile(const T* const* a, const T* const* b, int64_t dim, S scale, Tile<S>& out) {
  constexpr int rows = kVectorBytes == 64 ? kTile : kTile / 2;
  Vec<S> sums[kTile * kTile];
  for (int top = 0; top < kTile; top += rows) {
    Vec<S> acc[rows][kTile] = {};
    for_channels<T>(kDim ? kDim : dim, [&](int64_t c, auto load, auto) {
      const Vec<S> b0 = load(b[0] + c), b1 = load(b[1] + c), b2 = load(b[2] + c),
                   b3 = load(b[3] + c);
      for (int i = 0; i < rows; ++i) {
        const Vec<S> row = load(a[top + i] + c);
        acc[i][0] = row * b0 + acc[i][0];
        acc[i][1] = row * b1 + acc[i][1];
        acc[i][2] = row * b2 + acc[i][2];
        acc[i][3] = row * b3 + acc[i][3];
      }
    });
    for (int i = 0; i < rows * kTile; ++i) sums[top * kTile + i] = acc[i / kTile][i % kTile];
  }
  for (int group = 0; group < kTile * kTile; group += kLanes<S>) {
    sum_lanes<S>(sums + group);
    store(&out.at[0][0] + group, sums[group] * scale);
  }
}

// out_i = sum_j weight(i, j) b_j
template <class T, int kDim, class Weight>
inline void mix_tile(const T* const* b, Weight&& weight, int64_t dim, T* const* out) {
  using S = AccumulateT<T>;
  for_channels<T>(kDim ? kDim : dim, [&](int64_t c, auto load, auto store) {
    const Vec<S> b0 = load(b[0] + c), b1 = load(b[1] + c), b2 = load(b[2] + c), b3 = load(b[3] + c);
    for (int i = 0; i < kTile; ++i) {
      store(out[i] + c,
            b0 * weight(i, 0) + b1 * weight(i, 1) + b2 * weight(i, 2) + b3 * weight(i, 3));
    }
  });
}

// ---- softmax over the four keys of each row
// A row is four neighbouring lanes of a vector, so that its sum and maximum are two exchanges
// inside the vector.

template <class S, int kDistance, int... kLane>
inline Vec<S> exchange(Vec<S> v, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
#else
  using Mask = typename VecOf<S>::mask;
  return __builtin_shuffle(v, Mask{(kLane ^ kDistance)...});
#endif
}
template <class S, int kDistance>
inline Vec<S> exchange(Vec<S> v) {
  return exchange<S, kDistance>(v, std::make_integer_sequence<int, kLanes<S>>{});
}
template <class S>
inline Vec<S> row_sum(Vec<S> v) {
  v += exchange<S, 1>(v);
  return v + exchange<S, 2>(v);
}
template <class S>
inline Vec<S> row_max(Vec<S> v) {
  v = max<S>(v, exchange<S, 1>(v));
  return max<S>(v, exchange<S, 2>(v));
}

template <class S>
inline void softmax_tile(Tile<S>& tile) {
  S* scores = &tile.at[0][0];
  for (int i = 0; i < kTile * kTile; i += kLanes<S>) {
    const Vec<S> row = load(scores + i);
    const Vec<S> weights = exp(row - row_max<S>(row));
    store(scores + i, weights / row_sum<S>(weights));
  }
}

// grad_scores = P * (grad_P - sum_j P grad_P) * scale, in place of grad_P.
template <class S>
inline void softmax_tile_backward(const Tile<S>& tile, S scale, Tile<S>& grad_tile) {
  S* grads = &grad_tile.at[0][0];
  for (int i = 0; i < kTile * kTile; i += kLanes<S>) {
    const Vec<S> p = load(&tile.at[0][0] + i), grad = load(grads + i);
    store(grads + i, p * (grad - row_sum<S>(p * grad)) * scale);
  }
}

}  // namespace
}  // namespace uhd
