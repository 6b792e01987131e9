// SPDX-License-Identifier: Apache-2.0
// Where the windows of packed tokens are. No torch here: kernels include this file.
//
// A view table has one row per view and a last row that holds the totals:
//   {first token, height, width, first window}      units: tokens, tokens, tokens, windows
// Windows are f x f groups of a view in raster order; those at the right and bottom edge may hold
// fewer tokens.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define UHD_EVERYWHERE __host__ __device__
#else
#define UHD_EVERYWHERE
#endif

namespace uhd {

// For a >= 0 and b >= 1 of any size: nothing here can overflow.
UHD_EVERYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct ViewRow {
  int64_t token_begin, height, width, window_begin;
};

struct ViewTable {
  const ViewRow* rows;  // in the memory of the device that the kernels run on
  int64_t num_views;
  int64_t window;  // side f
  // Rows of the tensors with one row per token, or per window. Rows beyond those of the views are
  // padding: nothing reads them, and they come out as zeros.
  int64_t token_rows, window_rows;

  // Only for code that runs where the rows are.
  UHD_EVERYWHERE int64_t num_tokens() const { return rows[num_views].token_begin; }
  UHD_EVERYWHERE int64_t num_windows() const { return rows[num_views].window_begin; }
};

// One window: its tokens are first + r * row_stride + c for r < rows, c < cols.
struct Window {
  int64_t first;       // packed index of the top-left token
  int64_t row_stride;  // width of the view
  int64_t rows, cols;  // tokens present; less than f at the edges
  int64_t compact;     // index of the first token when tokens are in window-major order

  int64_t size() const { return rows * cols; }
  int64_t token(int64_t i) const { return first + (i / cols) * row_stride + i % cols; }
};

namespace {  // a copy per instruction set: see vec.h

// Walks the windows begin, begin + 1, ... of all views.
class WindowCursor {
 public:
  WindowCursor(const ViewTable& table, int64_t begin) : table_(table) {
    int64_t low = 0, high = table.num_views;  // the last view whose first window is not after begin
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (table.rows[middle].window_begin <= begin ? low : high) = middle;
    }
    view_ = low;
    index_ = begin - table.rows[low].window_begin;
  }

  Window next() {
    const ViewRow* row = &table_.rows[view_];
    while (index_ >=
           row[1].window_begin - row->window_begin) {  // also steps over views without tokens
      index_ = 0;
      row = &table_.rows[++view_];
    }
    const int64_t f = table_.window, across = ceil_div(row->width, f);
    const int64_t top = index_ / across * f, left = index_ % across * f;
    ++index_;
    const int64_t rows = row->height - top < f ? row->height - top : f;
    const int64_t cols = row->width - left < f ? row->width - left : f;
    const int64_t in_view = top * row->width;
    return {row->token_begin + in_view + left, row->width, rows, cols,
            row->token_begin + in_view + left * rows};
  }

 private:
  ViewTable table_;
  int64_t view_, index_;
};

}  // namespace
}  // namespace uhd
