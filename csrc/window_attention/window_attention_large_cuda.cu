// SPDX-License-Identifier: Apache-2.0
// Forward pass for windows of up to 16 x 16 tokens. One block per window and head: k and v lie in
// shared memory, every warp takes strips of 16 queries over all keys. Where k and v are larger than
// shared memory, they come in parts.
#include <cstdlib>

#include "window_attention/large_softmax.cuh"
#include "window_attention/large_windows.h"

namespace uhd {
namespace {

struct Traits {
  // Keys at a time: a window of 8 x 8 needs no second look at the maximum, and the scores take 32
  // registers.
  static constexpr int kTiles = 8;
  static constexpr int kKeys = kTiles * 8;
  // Blocks have at most 256 threads, but few registers let several of them share an SM: this bound
  // leaves 128 a thread, or 168 where sums and scores together come near 128.
  static constexpr int kThreads(int head_dim) { return head_dim < 128 ? 512 : 384; }
};

// The attention of 16 queries: sums of values, each row to be multiplied by `factor`.
template <class T, int kDim>
class Attention {
 public:
  float sums[kDim / 8][4];

  UHD_DEVICE Attention() {
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[c][i] = 0.0f;
    }
  }
  // Takes in `count` keys.
  UHD_DEVICE void see(const T* q, const T* k, const T* v, int count, float exponent_scale) {
    constexpr int kStride = Row<kDim>::kStride;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += Traits::kKeys) {
      float scores[Traits::kTiles][4], correction[2];
      row_products<T, kDim>(scores, q, k + begin * kStride, count - begin);
      scale_and_mask(scores, exponent_scale, count - begin);
      softmax_.see(scores, correction);
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][i] *= correction[i / 2];
      }
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n][i] = softmax_.weigh(scores[n][i], i / 2) * kWeightsUp<T>;
        }
      }
      add_weighted<T, kDim>(sums, scores, v + begin * kStride, count - begin);
    }
  }
  UHD_DEVICE void finish(float (&factor)[2]) {
    softmax_.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) factor[half] = kWeightsDown<T> / softmax_.sum(half);
  }

 private:
  OnlineSoftmax softmax_;
};

// One block per window and head. kInParts: plan.column_tokens of k and v at a time.
template <class T, int kDim, bool kInParts>
__global__ void __launch_bounds__(Traits::kThreads(kDim), 1)
    large_forward(const WindowAttention args, const LargePlan plan) {
  constexpr int kStride = Row<kDim>::kStride;
  zero_rows(static_cast<T*>(args.out), args.heads * kDim, args.views.num_tokens(),
            args.views.token_rows);
  WindowAndHead work;
  if (!find_window(args, work)) return;
  const TokenMap raster = TokenMap::raster(work.window);
  const auto q = input_rows<T>(args.q, args.q_strides, raster, work.head);
  const auto k_rows = input_rows<T>(args.k, args.k_strides, raster, work.kv_head);
  const auto v_rows = input_rows<T>(args.v, args.v_strides, raster, work.kv_head);
  const auto out = output_rows<T, kDim>(
      args.out, args.heads * kDim, args.window_order ? TokenMap::window_order(work.window) : raster,
      work.head);
  const int warp = threadIdx.x / kWarp, step = plan.warps * kStrip;
  T* k = dynamic_shared<T>();
  T* v = k + plan.column_tokens * kStride;
  T* own = v + (plan.column_tokens + warp * kStrip) * kStride;  // rows of q, then of out

  if constexpr (kInParts) {
    const ChunkWalk<kDim> all_threads(threadIdx.x, blockDim.x);
    for (int round = 0; round < work.tokens; round += step) {  // the same ones in all warps
      const int begin = round + warp * kStrip;
      if (begin < work.tokens) load_strip<T, kDim>(own, q, begin, work);
      Attention<T, kDim> attention;
#pragma unroll 1
      for (int first = 0; first < work.tokens; first += plan.column_tokens) {
        const int rows = min(plan.column_tokens, work.padded_tokens - first);
        __syncthreads();  // nobody needs the part before any more
        load_rows<T, kDim>(k, k_rows, first, rows, work.tokens, all_threads);
        load_rows<T, kDim>(v, v_rows, first, rows, work.tokens, all_threads);
        wait_for_loads();
        __syncthreads();
        if (begin >= work.tokens) continue;
        attention.see(own, k, v, min(plan.column_tokens, work.tokens - first), plan.exponent_scale);
      }
      if (begin >= work.tokens) continue;
      float factor[2];
      attention.finish(factor);
      store_strip<T, kDim>(own, attention.sums, factor, out, begin, work.tokens);
    }
  } else {
    int begin = warp * kStrip;
    load_strip<T, kDim>(own, q, begin, work);
    load_window<T, kDim>(k, k_rows, work);
    load_window<T, kDim>(v, v_rows, work);
    wait_for_loads();
    __syncthreads();
    while (begin < work.tokens) {
      Attention<T, kDim> attention;
      attention.see(own, k, v, work.tokens, plan.exponent_scale);
      float factor[2];
      attention.finish(factor);
      store_strip<T, kDim>(own, attention.sums, factor, out, begin, work.tokens);
      begin += step;
      if (begin >= work.tokens) break;
      load_strip<T, kDim>(own, q, begin, work);
      wait_for_loads();
      __syncwarp();
    }
  }
}

template <class T>
bool rows_fit(const WindowAttention& args) {
  const auto input = [](const void* data, TokenStrides strides) {
    return aligned_16<T>({data, strides.token}) && aligned_16<T>({data, strides.head}) &&
           std::abs(strides.token) <= kLargestStride;
  };
  const auto output = [](const void* data, int64_t stride) {
    return aligned_16<T>({data, stride}) && stride <= kLargestStride;
  };
  return input(args.q, args.q_strides) && input(args.k, args.k_strides) &&
         input(args.v, args.v_strides) && input(args.grad_out, args.grad_out_strides) &&
         output(args.out, args.heads * args.head_dim) && output(args.grad_q, args.grad_q_stride) &&
         output(args.grad_k, args.grad_kv_stride) && output(args.grad_v, args.grad_kv_stride);
}

}  // namespace

namespace cuda {

bool large_windows_fit(const WindowAttention& args) {
  const bool half = args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16;
  if (!half || args.views.window < 5 || args.views.window > 16) return false;
  // No block adds up the gradients of a key over the heads of a group.
  if (args.grad_out && args.group > 1) return false;
  bool head_dim = false;
  for (const int dim : {64, 72, 80, 96, 128}) head_dim = head_dim || args.head_dim == dim;
  if (!head_dim || !rows_fit<BFloat16>(args) || large_blocks(args) > INT32_MAX) return false;
  return (args.grad_out ? plan_backward(args) : plan_forward(args)).warps > 0;
}

const char* large_windows_forward(const WindowAttention& args, void* stream) {
  const LargePlan plan = plan_forward(args);
  return with_half_and_head_dim(args, [&](auto element, auto head_dim) {
    using T = decltype(element);
    auto kernel = large_forward<T, head_dim, false>;
    if constexpr (head_dim > 80) {  // smaller heads fit everywhere
      if (plan.column_tokens < plan.padded_tokens) kernel = large_forward<T, head_dim, true>;
    }
    return launch(kernel, dim3(unsigned(large_blocks(args))), dim3(plan.warps * kWarp),
                  plan.shared_bytes, stream, args, plan);
  });
}

}  // namespace cuda
}  // namespace uhd
