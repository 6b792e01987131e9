// SPDX-License-Identifier: Apache-2.0
// Lists of grids, and the view tables that they make.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "driver/sides.h"

namespace uhd {
namespace driver {

using Grids = std::vector<std::pair<int64_t, int64_t>>;

// Views in tensors with a number of padding rows, for tokens and for windows.
class Layout {
 public:
  Layout(const Grids& grids, int64_t window, int64_t token_padding, int64_t window_padding);

  ViewTable table(Side& side) const;
  int64_t num_tokens() const { return rows_.back().token_begin; }
  int64_t num_windows() const { return rows_.back().window_begin; }
  int64_t token_rows() const { return num_tokens() + token_padding_; }
  int64_t window_rows() const { return num_windows() + window_padding_; }
  std::string name() const { return name_; }

 private:
  std::vector<ViewRow> rows_;
  int64_t window_, token_padding_, window_padding_;
  std::string name_;
};

// Ragged views, views without tokens, views of one token, none at all; `quick`: the first ones.
std::vector<Layout> layouts(int64_t window, bool quick);

// Elements between the rows of an input: none, 16 bytes in every type, and one, which leaves no
// row aligned.
constexpr int64_t kGaps[] = {0, 8, 1};

}  // namespace driver
}  // namespace uhd
