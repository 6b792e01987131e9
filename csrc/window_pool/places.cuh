// SPDX-License-Identifier: Apache-2.0
// One chunk of channels of all tokens of a window: where it lies, and what both kinds of windows
// compute of it.
#pragma once
#include <cmath>

#include "common/windows.cuh"
#include "window_pool/window_pool.h"

namespace uhd {
namespace {

// e^x for x <= 0; for half types, whose rounding is far above the error of the instruction, 2^x.
template <class T>
UHD_DEVICE AccumulateT<T> exponential(AccumulateT<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approximate(x * 1.4426950408889634f);
  } else {
    return std::exp(x);
  }
}

// Of a logit, from the gradient of its token: +0 where the token is alone, as on the CPU.
template <class S>
UHD_DEVICE S logit_gradient(S grad_token, S token, S pooled) {
  return grad_token * (token - pooled) + S(0);
}

// The rows of a tensor that belong to the tokens of a window, from one channel on.
template <class T>
struct Tokens {
  T* first;
  int64_t down, across;

  UHD_DEVICE Tokens(T* tensor, int64_t stride, const DeviceWindow& window, int64_t channel)
      : first(tensor + window.first * stride + channel),
        down(window.row_stride * stride),
        across(stride) {}
  UHD_DEVICE T* at(int row, int col) const { return first + row * down + col * across; }
};

// One chunk of channels of all tokens of a window.
template <class T, int kWidth>
struct Place {
  using Chunk = Elements<T, kWidth>;
  Tokens<const T> x, logits;
  int rows, cols;

  UHD_DEVICE Place(const WindowPool& args, const DeviceWindow& window, int64_t channel)
      : x(static_cast<const T*>(args.x), args.x_stride, window, channel),
        logits(static_cast<const T*>(args.logits), args.logits_stride, window, channel),
        rows(window.rows),
        cols(window.cols) {}

  // Calls body(row, col) for every token.
  template <class Body>
  UHD_DEVICE void for_tokens(Body&& body) const {
    for (int row = 0; row < rows; ++row) {
      for (int col = 0; col < cols; ++col) body(row, col);
    }
  }
};

}  // namespace
}  // namespace uhd
