// SPDX-License-Identifier: Apache-2.0
// The second stage of a deterministic sum over rows: the blocks of the first stage wrote one row of
// partial sums each.
#pragma once
#include "common/device.cuh"

namespace uhd {
namespace {

struct ColumnSumTraits {
  // Few blocks have work (one for 32 columns), so the rows are spread over many warps: 512 partial
  // rows are 32 loads a thread, of which 8 are under way at a time.
  static constexpr int kWarps = 16;
};

// out[c] = sum over r of rows[r * width + c]. The order of additions depends on the count alone.
template <class S>
__global__ void __launch_bounds__(ColumnSumTraits::kWarps* kWarp)
    column_sums(const S* rows, int64_t count, int64_t width, S* out) {
  constexpr int kWarps = ColumnSumTraits::kWarps;
  S* sums = dynamic_shared<S>();
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane;
  S sum = S(0);
  if (c < width) {
#pragma unroll 8
    for (int64_t r = warp; r < count; r += kWarps) sum += rows[r * width + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || c >= width) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kWarp + lane];
  out[c] = sum;
}

template <class S>
const char* launch_column_sums(const S* rows, int64_t count, int64_t width, S* out, void* stream) {
  constexpr int kThreads = ColumnSumTraits::kWarps * kWarp;
  return launch(column_sums<S>, blocks_for(width, kWarp), kThreads, kThreads * sizeof(S), stream,
                rows, count, width, out);
}

}  // namespace
}  // namespace uhd
