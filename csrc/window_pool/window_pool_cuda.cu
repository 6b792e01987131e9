// SPDX-License-Identifier: Apache-2.0
// One warp per window; its lanes lie side by side along the channels, 16 bytes each. Tokens are
// added in raster order, as on the CPU.
#include "window_pool/pool_2x2.cuh"
#include "window_pool/pool_any.cuh"

namespace uhd {
namespace {

struct Traits {
  // As for window_mean: 8 windows a block keep the blocks of a small call near the number of SMs.
  static constexpr int kWarps = 8;
  // Blocks that a multiprocessor must hold: 128 registers a thread, for the 8 or 9 chunks of 16
  // bytes that each has in flight. 512 threads of that kind ask for more than memory can deliver.
  static constexpr int kBlocks = 2;
};

dim3 grid_of(const WindowPool& args) {
  // One block at least, for the padding rows of a call without windows.
  const int64_t windows = args.views.window_rows;
  return blocks_for(windows > 0 ? windows : 1, Traits::kWarps);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBlocks)
    pool_forward(const WindowPool args) {
  T* out = static_cast<T*>(args.out);
  const int num_windows = int(args.views.num_windows());
  zero_rows(out, args.channels, num_windows, args.views.window_rows);
  const int64_t index = int64_t(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  if (index >= num_windows) return;
  const DeviceWindow window = window_at(args.views, int(index));
  out += index * args.channels;
  const bool full = window.rows == 2 && window.cols == 2;
  const AccumulateT<T> scale = pool_scale<AccumulateT<T>>(window.size());
  for (int64_t c = threadIdx.x % kWarp * kWidth; c < args.channels; c += kWarp * kWidth) {
    const Place<T, kWidth> place(args, window, c);
    full ? forward_2x2(place, out + c) : forward_any(place, scale, out + c);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBlocks)
    pool_backward(const WindowPool args) {
  T* grad_x = static_cast<T*>(args.grad_x);
  T* grad_logits = static_cast<T*>(args.grad_logits);
  const int num_windows = int(args.views.num_windows());
  zero_rows(grad_x, args.channels, args.views.num_tokens(), args.views.token_rows);
  zero_rows(grad_logits, args.channels, args.views.num_tokens(), args.views.token_rows);
  const int64_t index = int64_t(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  if (index >= num_windows) return;
  const DeviceWindow window = window_at(args.views, int(index));
  const T* grad_out = static_cast<const T*>(args.grad_out) + index * args.grad_out_stride;
  const bool full = window.rows == 2 && window.cols == 2;
  const AccumulateT<T> scale = pool_scale<AccumulateT<T>>(window.size());
  for (int64_t c = threadIdx.x % kWarp * kWidth; c < args.channels; c += kWarp * kWidth) {
    const Place<T, kWidth> place(args, window, c);
    const Tokens<T> to_x(grad_x, args.channels, window, c);
    const Tokens<T> to_logits(grad_logits, args.channels, window, c);
    full ? backward_2x2(place, to_x, to_logits, grad_out + c)
         : backward_any(place, scale, to_x, to_logits, grad_out + c);
  }
}

}  // namespace

namespace cuda {

const char* window_pool_forward(const WindowPool& args, void* stream) {
  return with_width(args.dtype, args.channels,
                    {{args.x, args.x_stride}, {args.logits, args.logits_stride}},
                    [&](auto element, auto width) {
                      return launch(pool_forward<decltype(element), width>, grid_of(args),
                                    Traits::kWarps * kWarp, 0, stream, args);
                    });
}

const char* window_pool_backward(const WindowPool& args, void* stream) {
  return with_width(args.dtype, args.channels,
                    {{args.x, args.x_stride},
                     {args.logits, args.logits_stride},
                     {args.grad_out, args.grad_out_stride}},
                    [&](auto element, auto width) {
                      return launch(pool_backward<decltype(element), width>, grid_of(args),
                                    Traits::kWarps * kWarp, 0, stream, args);
                    });
}

}  // namespace cuda
}  // namespace uhd
