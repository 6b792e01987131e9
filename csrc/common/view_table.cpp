// SPDX-License-Identifier: Apache-2.0
#include "common/view_table.h"

#include <vector>

#include "common/glue.h"

namespace uhd {
#ifndef UHD_WITH_CUDA
namespace {

// The row below one whose sides are known, its own sides zero. Sides that wrap around would pass
// for few tokens.
ViewRow next_row(const ViewRow& row, int64_t window) {
  STD_TORCH_CHECK(row.height >= 0 && row.width >= 0, "grids must not be negative, got (",
                  row.height, ", ", row.width, ")");
  const int64_t tokens = checked_product(row.height, row.width);
  // No more than the tokens: this product fits.
  const int64_t windows = ceil_div(row.height, window) * ceil_div(row.width, window);
  ViewRow next{};
  STD_TORCH_CHECK(!__builtin_add_overflow(row.token_begin, tokens, &next.token_begin),
                  "the tokens of all views do not fit in 64 bits");
  next.window_begin = row.window_begin + windows;  // no more than the tokens, again
  return next;
}

}  // namespace
#endif

ViewTable view_table(const Tensor& views, int64_t window, int64_t token_rows, int64_t window_rows) {
  STD_TORCH_CHECK(views.dim() == 2 && views.size(0) >= 1 && views.size(1) == 4 &&
                      views.scalar_type() == ScalarType::Long && views.is_contiguous(),
                  "views must be a contiguous int64 table of shape (S + 1, 4)");
  STD_TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
  const ViewTable table{static_cast<const ViewRow*>(views.const_data_ptr()), views.size(0) - 1,
                        window, token_rows, window_rows};
#ifdef UHD_CUDA_KERNELS
  // The table cannot be read here. Kernels count tokens, windows and views in 32 bits.
  STD_TORCH_CHECK(
      token_rows < kLargestCount && window_rows < kLargestCount && table.num_views < kLargestCount,
      "a call takes less than 2^31 tokens, got ", token_rows);
#else
  ViewRow expected{};
  for (int64_t i = 0; i <= table.num_views; ++i) {
    const ViewRow& row = table.rows[i];
    STD_TORCH_CHECK(
        row.token_begin == expected.token_begin && row.window_begin == expected.window_begin,
        "views: row ", i, " does not continue the rows above it");
    if (i < table.num_views) expected = next_row(row, window);
  }
  STD_TORCH_CHECK(table.num_tokens() <= token_rows, "the views hold ", table.num_tokens(),
                  " tokens, more than the ", token_rows, " rows");
  STD_TORCH_CHECK(table.num_windows() <= window_rows, "the views hold ", table.num_windows(),
                  " windows, more than the ", window_rows, " rows");
#endif
  return table;
}

#ifndef UHD_WITH_CUDA

namespace {

class TableWriter {
 public:
  TableWriter(Tensor table, int64_t window)
      : row_(static_cast<ViewRow*>(table.mutable_data_ptr())), window_(window) {
    STD_TORCH_CHECK(window >= 1, "window must be at least 1, got ", window);
  }
  void add(int64_t height, int64_t width) {
    next_.height = height;
    next_.width = width;
    *row_++ = next_;
    next_ = next_row(next_, window_);
  }
  void finish() { *row_ = next_; }

 private:
  ViewRow* row_;
  int64_t window_;
  ViewRow next_{};
};

Tensor empty_table(int64_t num_views) {
  const int64_t sizes[2] = {num_views + 1, 4};
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2), ScalarType::Long);
}

// sides: h0, w0, h1, w1, ... ; the list is laid out `repeat` times.
Tensor make_view_table(std::vector<int64_t> sides, int64_t repeat, int64_t window) {
  STD_TORCH_CHECK(sides.size() % 2 == 0 && repeat >= 0, "sides must hold (h, w) pairs");
  const int64_t num_views = static_cast<int64_t>(sides.size()) / 2;
  Tensor table = empty_table(checked_product(num_views, repeat));
  TableWriter writer(table, window);
  for (int64_t r = 0; r < repeat && num_views > 0; ++r) {
    for (int64_t i = 0; i < num_views; ++i) writer.add(sides[2 * i], sides[2 * i + 1]);
  }
  writer.finish();
  return table;
}

// rows: (S + 1, 2) int64, the last row ignored. It keeps the number of rows above one for one view,
// so that torch.compile does not specialise on "exactly one".
Tensor make_view_table_from_rows(const Tensor& rows, int64_t window) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(0) >= 1 && rows.size(1) == 2 &&
                      rows.scalar_type() == ScalarType::Long && rows.is_contiguous(),
                  "rows must be a contiguous int64 tensor of shape (S + 1, 2)");
  const int64_t num_views = rows.size(0) - 1;
  const auto* sides = static_cast<const int64_t*>(rows.const_data_ptr());
  Tensor table = empty_table(num_views);
  TableWriter writer(table, window);
  for (int64_t i = 0; i < num_views; ++i) writer.add(sides[2 * i], sides[2 * i + 1]);
  writer.finish();
  return table;
}

}  // namespace

#endif

}  // namespace uhd

#ifndef UHD_WITH_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("_view_table(SymInt[] sides, SymInt repeat, SymInt window) -> Tensor");
  m.def("_view_table_from_rows(Tensor rows, SymInt window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(uhd_ops, CompositeExplicitAutograd, m) {
  m.impl("_view_table", TORCH_BOX(&uhd::make_view_table));
  m.impl("_view_table_from_rows", TORCH_BOX(&uhd::make_view_table_from_rows));
}
#endif
