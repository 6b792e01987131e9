// SPDX-License-Identifier: Apache-2.0
// Copies of whole rows. The slots that a ragged window has no token for repeat the nearest one, so
// only there the backward pass has something to add.
#include "common/vec.h"
#include "pixel_unshuffle/pixel_unshuffle.h"

namespace uhd {
namespace UHD_ISA {
namespace {

template <class T>
void copy(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
void forward_window(const PixelUnshuffle& args, const Window& window, T* out) {
  const int64_t f = args.views.window, channels = args.channels, row = f * channels;
  const T* x = static_cast<const T*>(args.x);
  for (int64_t r = 0; r < window.rows; ++r) {
    const T* tokens = x + (window.first + r * window.row_stride) * args.x_stride;
    T* slots = out + r * row;
    if (args.x_stride == channels) {
      copy(slots, tokens, window.cols * channels);
    } else {
      for (int64_t c = 0; c < window.cols; ++c) {
        copy(slots + c * channels, tokens + c * args.x_stride, channels);
      }
    }
    for (int64_t c = window.cols; c < f; ++c) {
      copy(slots + c * channels, slots + (window.cols - 1) * channels, channels);
    }
  }
  for (int64_t r = window.rows; r < f; ++r) copy(out + r * row, out + (window.rows - 1) * row, row);
}

// The slots [begin, end) of a window's side that repeat the token at `place`: its own, and for the
// last token those beyond the edge of the view.
struct Slots {
  int64_t begin, end;
  Slots(int64_t place, int64_t present, int64_t f)
      : begin(place), end(place + 1 == present ? f : place + 1) {}
};

template <class T>
void sum_slots(const T* grad_out, const Slots& rows, const Slots& cols, int64_t f, int64_t channels,
               T* grad_token) {
  for_channels<T>(channels, [&](int64_t channel, auto load, auto store) {
    Vec<AccumulateT<T>> sum = {};
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t c = cols.begin; c < cols.end; ++c) {
        sum += load(grad_out + (r * f + c) * channels + channel);
      }
    }
    store(grad_token + channel, sum);
  });
}

template <class T>
void backward_window(const PixelUnshuffle& args, const Window& window, const T* grad_out) {
  const int64_t f = args.views.window, channels = args.channels;
  for (int64_t r = 0; r < window.rows; ++r) {
    T* grad_tokens =
        static_cast<T*>(args.grad_x) + (window.first + r * window.row_stride) * channels;
    if (window.rows == f && window.cols == f) {
      copy(grad_tokens, grad_out + r * f * channels, f * channels);
      continue;
    }
    for (int64_t c = 0; c < window.cols; ++c) {
      sum_slots(grad_out, Slots(r, window.rows, f), Slots(c, window.cols, f), f, channels,
                grad_tokens + c * channels);
    }
  }
}

}  // namespace

void pixel_unshuffle_forward(const PixelUnshuffle& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t merged = args.views.window * args.views.window * args.channels;
    WindowCursor cursor(args.views, begin);
    for (int64_t i = begin; i < end; ++i) {
      forward_window(args, cursor.next(), static_cast<T*>(args.out) + i * merged);
    }
  });
}

void pixel_unshuffle_backward(const PixelUnshuffle& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    WindowCursor cursor(args.views, begin);
    for (int64_t i = begin; i < end; ++i) {
      backward_window(args, cursor.next(),
                      static_cast<const T*>(args.grad_out) + i * args.grad_out_stride);
    }
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
