// SPDX-License-Identifier: Apache-2.0
// Vectors run along the channels; the tokens of a window are added in raster order, in blocks.
#include "common/blocked_sum.h"
#include "common/vec.h"
#include "window_mean/window_mean.h"

namespace uhd {
namespace UHD_ISA {
namespace {

// kSide is the side of a full window when it is known at compile time, else 0.
template <class T, int kSide>
void forward_window(const WindowMean& args, const Window& window, T* out) {
  using S = AccumulateT<T>;
  const int64_t rows = kSide ? kSide : window.rows, cols = kSide ? kSide : window.cols;
  const S count = static_cast<S>(rows * cols);
  const T* first = static_cast<const T*>(args.x) + window.first * args.x_stride;
  const int64_t down = window.row_stride * args.x_stride;
  for_channels<T>(args.channels, [&](int64_t channel, auto load, auto store) {
    BlockedSum<Vec<S>> sum;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        sum.add(load(first + r * down + c * args.x_stride + channel));
      }
    }
    store(out + channel, sum.total() / count);
  });
}

template <class T, int kSide>
void backward_window(const WindowMean& args, const Window& window, const T* grad_out) {
  using S = AccumulateT<T>;
  const int64_t rows = kSide ? kSide : window.rows, cols = kSide ? kSide : window.cols;
  const S count = static_cast<S>(rows * cols);
  T* first = static_cast<T*>(args.grad_x) + window.first * args.channels;
  const int64_t down = window.row_stride * args.channels;
  for_channels<T>(args.channels, [&](int64_t channel, auto load, auto store) {
    const Vec<S> share = load(grad_out + channel) / count;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        store(first + r * down + c * args.channels + channel, share);
      }
    }
  });
}

}  // namespace

void window_mean_forward(const WindowMean& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    WindowCursor cursor(args.views, begin);
    for (int64_t i = begin; i < end; ++i) {
      const Window window = cursor.next();
      T* out = static_cast<T*>(args.out) + i * args.channels;
      const bool full = window.rows == 2 && window.cols == 2;
      full ? forward_window<T, 2>(args, window, out) : forward_window<T, 0>(args, window, out);
    }
  });
}

void window_mean_backward(const WindowMean& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    WindowCursor cursor(args.views, begin);
    for (int64_t i = begin; i < end; ++i) {
      const Window window = cursor.next();
      const T* grad_out = static_cast<const T*>(args.grad_out) + i * args.grad_out_stride;
      const bool full = window.rows == 2 && window.cols == 2;
      full ? backward_window<T, 2>(args, window, grad_out)
           : backward_window<T, 0>(args, window, grad_out);
    }
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
