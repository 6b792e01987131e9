// SPDX-License-Identifier: Apache-2.0
// A chunk of channels of a 2 x 2 window: its eight rows are read at once and stay in registers.
#pragma once
#include "window_pool/places.cuh"

namespace uhd {
namespace {

// The tokens of a chunk and their logits.
template <class T, int kWidth>
struct Quad {
  Elements<T, kWidth> x[4], logits[4];

  UHD_DEVICE explicit Quad(const Place<T, kWidth>& place) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = Elements<T, kWidth>::load(place.x.at(i / 2, i % 2));
      logits[i] = Elements<T, kWidth>::load(place.logits.at(i / 2, i % 2));
    }
  }
};

template <class T>
struct Weights {
  using S = AccumulateT<T>;
  S at[4], sum;

  // Of channel c. A NaN or +inf among the logits leaves no weight that is not NaN.
  template <int kWidth>
  UHD_DEVICE Weights(const Quad<T, kWidth>& quad, int c) : sum(0) {
    S largest = quad.logits[0].value[c];
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const S logit = quad.logits[i].value[c];
      largest = logit > largest ? logit : largest;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[i] = exponential<T>(quad.logits[i].value[c] - largest) * pool_scale<S>(4);
      sum += at[i];
    }
  }
  template <int kWidth>
  UHD_DEVICE S total(const Quad<T, kWidth>& quad, int c) const {
    S total = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += at[i] * quad.x[i].value[c];
    return total;
  }
};

template <class T, int kWidth>
UHD_DEVICE void forward_2x2(const Place<T, kWidth>& place, T* out) {
  const Quad<T, kWidth> quad(place);
  Elements<T, kWidth> pooled;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const Weights<T> weights(quad, c);
    pooled.value[c] = weights.total(quad, c) / weights.sum;
  }
  pooled.store(out);
}

template <class T, int kWidth>
UHD_DEVICE void backward_2x2(const Place<T, kWidth>& place, const Tokens<T>& grad_x,
                             const Tokens<T>& grad_logits, const T* grad_out) {
  using S = AccumulateT<T>;
  Quad<T, kWidth> quad(place);  // becomes the gradients
  const Elements<T, kWidth> grad = Elements<T, kWidth>::load(grad_out);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const Weights<T> weights(quad, c);
    const S inverse = S(1) / weights.sum;
    const S pooled = weights.total(quad, c) * inverse, share = grad.value[c] * inverse;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const S grad_token = weights.at[i] * share;
      quad.logits[i].value[c] = logit_gradient(grad_token, quad.x[i].value[c], pooled);
      quad.x[i].value[c] = grad_token;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    quad.x[i].store(grad_x.at(i / 2, i % 2));
    quad.logits[i].store(grad_logits.at(i / 2, i % 2));
  }
}

}  // namespace
}  // namespace uhd
