// SPDX-License-Identifier: Apache-2.0
// Where the tokens of a window are in memory. For *_cpu.cpp files only.
#pragma once
#include "window_attention/tile.h"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

// The rows of one tensor for one window and head.
template <class T>
class Rows {
 public:
  Rows(T* data, TokenStrides strides, const Window& window, int64_t head)
      : base_(data + window.first * strides.token + head * strides.head),
        stride_(strides.token),
        window_(window) {}

  T* operator[](int64_t i) const { return base_ + (window_.token(i) - window_.first) * stride_; }
  // Rows i .. i + 3, the last row repeated past the end.
  void tile(int64_t i, T** rows) const {
    const int64_t last = window_.size() - 1;
    for (int r = 0; r < kTile; ++r) rows[r] = (*this)[i + r < last ? i + r : last];
  }

 private:
  T* base_;
  int64_t stride_;
  Window window_;
};

// Where a window's tokens are in a tensor that is in window-major order.
Window in_window_order(const Window& w) { return {w.compact, w.cols, w.rows, w.cols, w.compact}; }

// Where the tokens of a window are.
struct Place {
  Window qk, v, out;  // in q, k and their gradients; in v and its gradient; in out and its gradient
  int64_t grad_k_stride;
};

// The rows of a head; those of q and k have the type Q.
template <class T, class Q>
struct Head {
  Rows<const Q> q, k;
  Rows<const T> v;
  Head(const WindowAttention& args, const Place& at, int64_t head)
      : q(static_cast<const Q*>(args.q), args.q_strides, at.qk, head),
        k(static_cast<const Q*>(args.k), args.k_strides, at.qk, head / args.group),
        v(static_cast<const T*>(args.v), args.v_strides, at.v, head / args.group) {}
};

// The four rows of a full 2 x 2 window, head after head, each head `group` times. Finding them
// costs divisions, so it is done once per window.
template <class T>
class Quad {
 public:
  Quad(T* data, TokenStrides strides, const Window& window, int64_t group = 1)
      : head_stride_(strides.head), group_(group), left_(group) {
    Rows<T>(data, strides, window, 0).tile(0, rows_);
  }
  T* const* rows() const { return rows_; }
  void next_head() {
    if (--left_ > 0) return;
    left_ = group_;
    for (T*& row : rows_) row += head_stride_;
  }

 private:
  int64_t head_stride_, group_, left_;
  T* rows_[kTile];
};

}  // namespace
}  // namespace uhd
