// SPDX-License-Identifier: Apache-2.0
#include "driver/layouts.h"

namespace uhd {
namespace driver {

Layout::Layout(const Grids& grids, int64_t window, int64_t token_padding, int64_t window_padding)
    : window_(window), token_padding_(token_padding), window_padding_(window_padding) {
  ViewRow row{};
  for (const auto& [height, width] : grids) {
    row.height = height;
    row.width = width;
    rows_.push_back(row);
    row.token_begin += height * width;
    row.window_begin += ceil_div(height, window) * ceil_div(width, window);
    name_ += (name_.empty() ? "" : " ") + std::to_string(height) + "x" + std::to_string(width);
  }
  rows_.push_back({row.token_begin, 0, 0, row.window_begin});
  name_ = "views [" + name_ + "] window " + std::to_string(window);
  name_ += " padding " + std::to_string(token_padding) + ", " + std::to_string(window_padding);
}

ViewTable Layout::table(Side& side) const {
  return {side.views(rows_), static_cast<int64_t>(rows_.size()) - 1, window_, token_rows(),
          window_rows()};
}

std::vector<Layout> layouts(int64_t window, bool quick) {
  std::vector<Layout> list{
      {{{0, 3}, {4, 6}, {3, 5}, {2, 0}, {1, 1}, {7, 1}, {0, 0}}, window, 5, 3},
      {{{9, 11}, {16, 16}}, window, 0, 0},
  };
  if (quick) return list;
  list.push_back({{{1, 1}}, window, 0, 2});
  list.push_back({{{17, 33}, {1, 40}}, window, 1, 0});
  list.push_back({{{0, 0}}, window, 2, 0});
  list.push_back({{}, window, 4, 4});
  list.push_back({{}, window, 0, 0});
  list.push_back({Grids(40, {3, 2}), window, 37, 41});  // more views than lanes, much padding
  return list;
}

}  // namespace driver
}  // namespace uhd
