// SPDX-License-Identifier: Apache-2.0
// Windows in a view table that lies on the device. Token and window numbers fit in 32 bits (the
// glue checks); offsets of elements do not.
#pragma once
#include "common/elements.cuh"
#include "common/view_table.h"

namespace uhd {
namespace {

// One window: its tokens are first + r * row_stride + c for r < rows, c < cols.
struct DeviceWindow {
  int first;       // packed index of the top-left token
  int row_stride;  // width of the view
  int rows, cols;  // tokens present; less than f at the edges
  int compact;     // index of the first token when tokens are in window-major order

  UHD_DEVICE int size() const { return rows * cols; }
};

// The last view that does not begin after the token or window `index`, by bisection.
UHD_DEVICE int last_view(const ViewTable& table, int64_t ViewRow::* begin, int index) {
  int low = 0, high = int(table.num_views);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.rows[middle].*begin <= index ? low : high) = middle;
  }
  return low;
}

// The view that holds a window, which must be below num_windows().
UHD_DEVICE int view_of_window(const ViewTable& table, int window) {
  return last_view(table, &ViewRow::window_begin, window);
}

// The view that holds a token, which must be below num_tokens().
UHD_DEVICE int view_of_token(const ViewTable& table, int token) {
  return last_view(table, &ViewRow::token_begin, token);
}

// The window number `index` of one view.
UHD_DEVICE DeviceWindow window_in_view(const ViewRow& view, int f, int index) {
  const int height = int(view.height), width = int(view.width);
  const int across = width / f + (width % f != 0);
  const int top = index / across * f, left = index % across * f;
  const int rows = height - top < f ? height - top : f;
  const int cols = width - left < f ? width - left : f;
  const int in_view = int(view.token_begin) + top * width;
  return {in_view + left, width, rows, cols, in_view + left * rows};
}

UHD_DEVICE DeviceWindow window_at(const ViewTable& table, int window) {
  const ViewRow view = table.rows[view_of_window(table, window)];
  // A window side beyond 2^31 tokens is the whole view.
  const int f = table.window < INT32_MAX ? int(table.window) : INT32_MAX;
  return window_in_view(view, f, window - int(view.window_begin));
}

// Writes zeros to `row_elements` elements of each of the rows [begin, end), which are `stride`
// apart. The blocks of a one-dimensional launch share the work; without padding it costs one
// comparison.
template <class T>
UHD_DEVICE void zero_rows(T* out, int64_t stride, int64_t row_elements, int64_t begin,
                          int64_t end) {
#pragma unroll 1  // rare, so short
  for (int64_t row = begin + blockIdx.x; row < end; row += gridDim.x) {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < row_elements; i += blockDim.x) out[row * stride + i] = T{};
  }
}

// Writes zeros to the rows [begin, end) of a contiguous tensor. All threads of all blocks of a
// one-dimensional launch share the work; where there is no padding it costs one comparison.
template <class T>
UHD_DEVICE void zero_rows(T* out, int64_t row_elements, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t stop = end * row_elements;
#pragma unroll 1  // rare, so short
  for (int64_t i = begin * row_elements + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < stop;
       i += threads) {
    out[i] = T{};
  }
}

}  // namespace
}  // namespace uhd
