// SPDX-License-Identifier: Apache-2.0
// A chunk of channels of any other window, larger or ragged: its rows are read again, from the
// caches, where they are needed, and its weights are computed again.
#pragma once
#include "common/blocked_sum.h"
#include "window_pool/places.cuh"

namespace uhd {
namespace {

// Of some or all tokens of a window: the sum of the weights, and that of the weighted tokens.
template <class T, int kWidth>
struct Sums {
  Elements<T, kWidth> weights, tokens;
  UHD_DEVICE Sums& operator+=(const Sums& other) {
    weights += other.weights;
    tokens += other.tokens;
    return *this;
  }
};

template <class T, int kWidth>
struct Pooled {
  using Chunk = Elements<T, kWidth>;
  Chunk largest, sum, total;  // largest logit, sum of the weights, sum of the weighted tokens

  UHD_DEVICE Pooled(const Place<T, kWidth>& place, AccumulateT<T> scale)
      : largest(Chunk::load(place.logits.first)) {
    place.for_tokens([&](int row, int col) {
      const Chunk logits = Chunk::load(place.logits.at(row, col));
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        if (logits.value[c] > largest.value[c]) largest.value[c] = logits.value[c];
      }
    });
    BlockedSum<Sums<T, kWidth>> sums;
    place.for_tokens([&](int row, int col) {
      const Chunk weights = this->weights(place, scale, row, col);
      Chunk token = Chunk::load(place.x.at(row, col));
#pragma unroll
      for (int c = 0; c < kWidth; ++c) token.value[c] *= weights.value[c];
      sums.add({weights, token});
    });
    const Sums<T, kWidth> all = sums.total();
    sum = all.weights;
    total = all.tokens;
  }

  UHD_DEVICE Chunk weights(const Place<T, kWidth>& place, AccumulateT<T> scale, int row,
                           int col) const {
    Chunk result = Chunk::load(place.logits.at(row, col));
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      result.value[c] = exponential<T>(result.value[c] - largest.value[c]) * scale;
    }
    return result;
  }
};

template <class T, int kWidth>
UHD_DEVICE void forward_any(const Place<T, kWidth>& place, AccumulateT<T> scale, T* out) {
  Pooled<T, kWidth> pooled(place, scale);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) pooled.total.value[c] /= pooled.sum.value[c];
  pooled.total.store(out);
}

template <class T, int kWidth>
UHD_DEVICE void backward_any(const Place<T, kWidth>& place, AccumulateT<T> scale,
                             const Tokens<T>& grad_x, const Tokens<T>& grad_logits,
                             const T* grad_out) {
  using Chunk = Elements<T, kWidth>;
  Pooled<T, kWidth> pooled(place, scale);
  Chunk share = Chunk::load(grad_out);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const AccumulateT<T> inverse = AccumulateT<T>(1) / pooled.sum.value[c];
    pooled.total.value[c] *= inverse;
    share.value[c] *= inverse;
  }
  place.for_tokens([&](int row, int col) {
    Chunk grad = pooled.weights(place, scale, row, col);
    Chunk logit_grad = Chunk::load(place.x.at(row, col));
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      grad.value[c] *= share.value[c];
      logit_grad.value[c] =
          logit_gradient(grad.value[c], logit_grad.value[c], pooled.total.value[c]);
    }
    grad.store(grad_x.at(row, col));
    logit_grad.store(grad_logits.at(row, col));
  });
}

}  // namespace
}  // namespace uhd
