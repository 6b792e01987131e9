// SPDX-License-Identifier: Apache-2.0
// How the kernels for large windows share out shared memory and warps. Host and device.
#pragma once
#include <algorithm>

#include "common/windows.cuh"
#include "window_attention/head_dims.h"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

// The tokens that one warp works on at a time: the rows of a tensor core's A and C.
constexpr int kStrip = 16;

template <int kDim>
struct Row {
  static constexpr int kChunks = kDim / 8;  // of 16 bytes
  // Elements from one row to the next in shared memory: an odd number of chunks, so that the eight
  // rows that ldmatrix reads at once lie in different banks.
  static constexpr int kStride = (kChunks | 1) * 8;
};

// One block has one window and one head. In its shared memory lie two tensors whole (columns: what
// every warp needs) and of two more one strip per warp (rows: what only that warp needs).
struct LargePlan {
  int warps;
  int padded_tokens;  // of the largest window, in whole strips
  int column_tokens;  // of these in the columns at a time: all, or fewer where memory is short
  // Backward: the strips of all warps are the whole tensors, so the second phase finds everything
  // in shared memory with the roles of rows and columns exchanged, and loads nothing.
  bool resident;
  size_t shared_bytes;
  float scale, exponent_scale;  // of the scores; as the argument of exp2
};

struct PlanTraits {
  // More warps could not have the 255 registers each that the backward pass of head size 128 takes.
  static constexpr int kMaxWarps = 8;
  static constexpr int kStatistics = 3;     // floats per token that the backward pass keeps
  static constexpr int kColumnTokens = 64;  // what the forward pass takes in one step
};

inline size_t row_bytes(int64_t head_dim) { return size_t((head_dim / 8 | 1) * 16); }

// As few rounds as kMaxWarps allow, and no more warps than these rounds need.
inline LargePlan plan_warps(const WindowAttention& args) {
  LargePlan plan{};
  const int side = int(args.views.window);
  const int strips = int(ceil_div(side * side, kStrip));
  plan.warps = int(ceil_div(strips, ceil_div(strips, PlanTraits::kMaxWarps)));
  plan.padded_tokens = plan.column_tokens = strips * kStrip;
  plan.scale = float(args.scale);
  plan.exponent_scale = float(args.scale * 1.4426950408889634);  // log2(e)
  return plan;
}

// Takes away warps until the block's shared memory is within the limit. Returns no warps if even
// one is too many.
inline LargePlan fit_warps(LargePlan plan, size_t fixed_bytes, size_t bytes_per_warp) {
  const size_t limit = shared_memory_limit();
  while (plan.warps > 0 && fixed_bytes + plan.warps * bytes_per_warp > limit) --plan.warps;
  plan.shared_bytes = fixed_bytes + plan.warps * bytes_per_warp;
  return plan;
}

// Columns: k and v. Rows: q, and then the output on its way to memory. Where k and v do not fit
// (16 x 16 tokens with large heads, in the 99 KB of compute capability 8.6, 8.9 and 12.0), they
// come kColumnTokens tokens at a time, for all warps together.
inline LargePlan plan_forward(const WindowAttention& args) {
  LargePlan plan = plan_warps(args);
  const size_t row = row_bytes(args.head_dim);
  const LargePlan whole = fit_warps(plan, 2 * plan.padded_tokens * row, kStrip * row);
  if (whole.warps > 0) return whole;
  plan.column_tokens = PlanTraits::kColumnTokens;
  return fit_warps(plan, 2 * plan.column_tokens * row, kStrip * row);
}

// First phase: columns k and v, rows q and grad_out. Second phase: the other way round. A gradient
// on its way to memory takes the place of rows, or where these stay resident has a strip more.
inline LargePlan plan_backward(const WindowAttention& args) {
  LargePlan plan = plan_warps(args);
  const size_t row = row_bytes(args.head_dim);
  const size_t fixed = plan.padded_tokens * (2 * row + PlanTraits::kStatistics * sizeof(float));
  LargePlan resident = fit_warps(plan, fixed, 3 * kStrip * row);
  resident.resident = resident.warps * kStrip == plan.padded_tokens;
  return resident.resident ? resident : fit_warps(plan, fixed, 2 * kStrip * row);
}

// One block per window and head, and at least one for rows of padding.
inline int64_t large_blocks(const WindowAttention& args) {
  return std::max<int64_t>(args.views.window_rows, 1) * args.heads;
}

}  // namespace
}  // namespace uhd
