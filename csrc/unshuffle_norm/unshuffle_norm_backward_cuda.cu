// SPDX-License-Identifier: Apache-2.0
// Backward pass. With n = (x - mean) * rstd and g = grad_z * weight, over the K channels of a
// window:
//   grad_x = rstd * (g - mean(g) - n * mean(g n)), summed over the slots that a token fills,
// plus the token's share of grad_residual. The gradients of the norm's weight and bias are sums
// over windows: each block adds up those of its windows and writes one row of `partials`, and a
// second kernel adds the rows in order. Which windows share a block follows from the sizes, never
// from the device, so the result is the same everywhere.
#include "unshuffle_norm/backward_2x2.cuh"
#include "unshuffle_norm/backward_any.cuh"

namespace uhd {
namespace {

struct PartialTraits {
  // 264 blocks are two for each SM of an H100, as many as it holds. A row of partials is as large
  // as x and grad_z of two windows of half types, so fewer windows would not pay for it; calls of
  // fewer than 528 windows have blocks of two, so that 1024 tokens use 128 SMs.
  static constexpr int kWindowsPerBlock = 2;
  static constexpr int kMaxBlocks = 264;
  // Warps that share the rows of partials: 264 / 16 dependent additions, not 264.
  static constexpr int kSumWarps = 16;
};

// Sums the rows of partials: a lane per column, a warp per group of rows, then the groups in order.
// The C channels of a slot lie as (pack, C / pack), and come out as (C / pack, pack).
template <class S>
__global__ void __launch_bounds__(PartialTraits::kSumWarps* kWarp)
    sum_partials(const UnshuffleNorm args, int64_t rows, int pack) {
  S* shared = dynamic_shared<S>();
  const int64_t merged = args.merged_channels();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  S sum = 0;
  if (column < 2 * merged) {
    const S* partials = static_cast<const S*>(args.partials) + column;
#pragma unroll 8
    for (int64_t row = warp; row < rows; row += PartialTraits::kSumWarps) {
      sum += partials[row * 2 * merged];
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || column >= 2 * merged) return;
  for (int i = 1; i < PartialTraits::kSumWarps; ++i) sum += shared[i * kWarp + lane];
  S* weight = static_cast<S*>(args.grad_norm_weight);
  S* bias = static_cast<S*>(args.grad_norm_bias);
  const int64_t columns = args.channels / pack, within = column % args.channels;
  const int64_t k = column - within + within % columns * pack + within / columns;
  *(k < merged ? weight + k : bias + k - merged) = sum;
}

// Shared memory holds so many bytes per thread, and two pairs of sums per warp: see block_sum.
template <class T, class... Parameters, class... Arguments>
const char* launch_windows(void (*kernel)(Parameters...), const UnshuffleNorm& args, int threads,
                           size_t bytes_each, int pack, void* stream, Arguments... arguments) {
  using S = AccumulateT<T>;
  const int64_t blocks = cuda::unshuffle_norm_blocks(args);
  const size_t shared = threads * bytes_each + 4 * size_t(threads / kWarp) * sizeof(S);
  const char* error = launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared,
                             stream, args, arguments...);
  if (error != nullptr || args.partials == nullptr) return error;
  constexpr int kThreads = PartialTraits::kSumWarps * kWarp;
  return launch(sum_partials<S>, blocks_for(2 * args.merged_channels(), kWarp), kThreads,
                kThreads * sizeof(S), stream, args, blocks, pack);
}

}  // namespace

namespace cuda {

// At least one, which writes the zeros of padding.
int64_t unshuffle_norm_blocks(const UnshuffleNorm& args) {
  const int64_t blocks = ceil_div(args.views.window_rows, PartialTraits::kWindowsPerBlock);
  return blocks < 1 ? 1 : blocks < PartialTraits::kMaxBlocks ? blocks : PartialTraits::kMaxBlocks;
}

const char* unshuffle_norm_backward(const UnshuffleNorm& args, void* stream) {
  const std::initializer_list<Rows> tensors = {{args.x, args.x_stride},
                                               {args.grad_z, args.grad_z_stride},
                                               {args.grad_residual, args.grad_residual_stride},
                                               {args.norm_weight, 0}};
  return with_width(args.dtype, args.channels, tensors, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr bool kVector = width > 1;
    if constexpr (sizeof(T) <= 4) {
      constexpr int kUsual = HeldTraits::kUsualThreads(sizeof(T)), kMost = HeldTraits::kMaxThreads;
      const int64_t threads = threads_for_columns<T>(args.channels, 2);
      if (args.views.window == 2 && threads <= kMost) {
        auto kernel = backward_2x2<T, kVector, kMost>;
        if constexpr (kVector) {
          if (threads <= kUsual) kernel = backward_2x2<T, kVector, kUsual>;
        }
        return launch_windows<T>(kernel, args, int(threads), NormGradient<T>::kBytes, width,
                                 stream);
      }
    }
    return launch_windows<T>(backward_any<T>, args, LoopTraits::kThreads, 0, 1, stream, kVector);
  });
}

}  // namespace cuda
}  // namespace uhd
