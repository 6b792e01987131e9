// SPDX-License-Identifier: Apache-2.0
// Tiles of windows with at most 16 tokens: where their tokens are, and their softmax.
//
// A tile has 16 slots and belongs to one warp. It holds 16 windows of side 1, 4 of side 2, or one
// of side 3 or 4; a slot without a token, at the edge of a view or beyond the ninth of side 3, is
// absent. A 16 x 16 matrix over the slots, say the scores of queries (rows) and keys (columns), is
// spread over the warp as the accumulators of two 16 x 8 products: with group = lane / 4 and
// place = lane % 4, element [half][2 r + c] is row group + 8 r, column 8 half + 2 place + c.
#pragma once
#include "common/mma.cuh"
#include "common/windows.cuh"

namespace uhd {
namespace {

constexpr int kSlots = 16;
using Square = float[2][4];

UHD_DEVICE int lane_group() { return threadIdx.x % kWarp / 4; }
UHD_DEVICE int lane_place() { return threadIdx.x % 4; }
// The slot of this lane's row r < 2, and of its column i < 4: column i % 2 of half i / 2.
UHD_DEVICE int row_slot(int r) { return lane_group() + 8 * r; }
UHD_DEVICE int column_slot(int i) { return 2 * lane_place() + i % 2 + 8 * (i / 2); }

// A window owns 2^shift slots of its tile.
UHD_HOST_DEVICE int slot_shift(int64_t window) { return window == 1 ? 0 : window == 2 ? 2 : 4; }

// No table says which tiles a view owns: the view v with first window b owns those from
// b / (windows of a tile) + v on. That is at least as many as it needs; the last may be empty.
struct SmallTile {
  int shift;
  // Index of the token in each of this lane's rows and columns, in raster order and in the order of
  // the output. An absent slot repeats the first token of the tile: what is read for it is real
  // memory, and masks keep it out of every result.
  int row[2], row_out[2];
  int column[4], column_out[4];
  uint32_t present;  // one bit per slot; 0 for an empty tile
  uint32_t pairs;  // bit 4 half + 2 r + c: both tokens of [half][2 r + c] are there, in one window

  UHD_DEVICE int num_windows() const { return kSlots >> shift; }
  UHD_DEVICE bool holds(int slot) const { return present >> slot & 1; }
  UHD_DEVICE uint32_t present_in(int window) const {
    return present & ((1u << (1 << shift)) - 1) << (window << shift);
  }
  UHD_DEVICE bool is_pair(int half, int i) const { return pairs >> (4 * half + i) & 1; }
};

struct Slot {
  int token, out;
  bool present;
};

// Slot number `slot` of a tile, for a tile number that some view owns.
UHD_DEVICE Slot find_slot(const ViewTable& table, bool window_order, int tile, int slot) {
  const int f = int(table.window), shift = slot_shift(f);
  const auto first_tile = [&](int view) {
    return int(table.rows[view].window_begin) / (kSlots >> shift) + view;
  };
  int low = 0, high = int(table.num_views);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tile(middle) <= tile ? low : high) = middle;
  }
  const ViewRow view = table.rows[low];
  const int count = int(table.rows[low + 1].window_begin - view.window_begin);
  const int64_t index = int64_t(tile - first_tile(low)) * (kSlots >> shift) + (slot >> shift);
  if (index >= count) return {0, 0, false};
  const DeviceWindow window = window_in_view(view, f, int(index));
  const int inside = slot & ((1 << shift) - 1), r = inside / f, c = inside % f;
  if (r >= window.rows || c >= window.cols) return {0, 0, false};
  const int token = window.first + r * window.row_stride + c;
  return {token, window_order ? window.compact + r * window.cols + c : token, true};
}

// Each lane looks one slot up, the others get it by shuffles.
UHD_DEVICE SmallTile find_tile(const ViewTable& table, bool window_order, int tile) {
  SmallTile result{};
  result.shift = slot_shift(table.window);
  if (table.num_views == 0) return result;
  Slot mine = find_slot(table, window_order, tile, threadIdx.x % kSlots);
  result.present = __ballot_sync(kFullWarp, mine.present) & 0xffff;
  if (result.present == 0) return result;
  const int first = __shfl_sync(kFullWarp, mine.token, 0);
  const int first_out = __shfl_sync(kFullWarp, mine.out, 0);
  if (!mine.present) mine = {first, first_out, false};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    result.row[r] = __shfl_sync(kFullWarp, mine.token, row_slot(r));
    result.row_out[r] = __shfl_sync(kFullWarp, mine.out, row_slot(r));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    result.column[i] = __shfl_sync(kFullWarp, mine.token, column_slot(i));
    result.column_out[i] = __shfl_sync(kFullWarp, mine.out, column_slot(i));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool pair = result.holds(row_slot(r)) && result.holds(column_slot(i)) &&
                        row_slot(r) >> result.shift == column_slot(i) >> result.shift;
      result.pairs |= uint32_t(pair) << (4 * (i / 2) + 2 * r + i % 2);
    }
  }
  return result;
}

// Sum or maximum over the four lanes that share a row.
UHD_DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
UHD_DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Turns scores into probabilities, 2^(factor * score) over its sum along the row. Zero where there
// is no pair, whatever the score is there: other windows of the tile may hold NaN.
UHD_DEVICE void softmax(Square& s, const SmallTile& tile, float factor) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float x[4], largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, at = 2 * r + i % 2;
      x[i] = tile.is_pair(half, at) ? s[half][at] * factor : -INFINITY;
      largest = fmaxf(largest, x[i]);
    }
    largest = row_max(largest);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = exp2_approximate(x[i] - largest);
      sum += x[i];
    }
    const float inverse = reciprocal_approximate(row_sum(sum));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, at = 2 * r + i % 2;
      s[half][at] = tile.is_pair(half, at) ? x[i] * inverse : 0.0f;
    }
  }
}

// Turns the gradient of the probabilities p into that of the scores before scaling.
UHD_DEVICE void softmax_backward(const Square& p, const SmallTile& tile, float scale,
                                 Square& grad) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float mean = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, at = 2 * r + i % 2;
      mean += tile.is_pair(half, at) ? p[half][at] * grad[half][at] : 0.0f;
    }
    mean = row_sum(mean);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, at = 2 * r + i % 2;
      const float difference = p[half][at] * (grad[half][at] - mean) * scale;
      grad[half][at] = tile.is_pair(half, at) ? difference : 0.0f;
    }
  }
}

}  // namespace
}  // namespace uhd
