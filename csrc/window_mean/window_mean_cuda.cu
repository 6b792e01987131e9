// SPDX-License-Identifier: Apache-2.0
// One warp per window; its lanes lie side by side along the channels, 16 bytes each. The tokens of
// a window are added in raster order, in blocks, as on the CPU.
#include "common/blocked_sum.h"
#include "common/windows.cuh"
#include "window_mean/window_mean.h"

namespace uhd {
namespace {

struct Traits {
  // Few registers and no shared memory, so any size fills an SM; 8 windows a block keep the number
  // of blocks of a small call near the number of SMs.
  static constexpr int kWarps = 8;
  // Blocks that a multiprocessor must hold: 64 registers a thread. Left alone, nvcc allows itself
  // 40 and spills around the division of a ragged window.
  static constexpr int kBlocks = 4;
};

dim3 grid_of(const WindowMean& args) {
  // One block at least, for the padding rows of a call without windows.
  const int64_t windows = args.views.window_rows;
  return blocks_for(windows > 0 ? windows : 1, Traits::kWarps);
}

// kSide is the side of a full window when it is known at compile time, else 0. With kSide = 2 all
// four loads of a lane are in flight at once.
template <class T, int kWidth, int kSide>
UHD_DEVICE void forward_window(const WindowMean& args, const DeviceWindow& window, T* out) {
  using Chunk = Elements<T, kWidth>;
  const int rows = kSide ? kSide : window.rows, cols = kSide ? kSide : window.cols;
  const AccumulateT<T> count = AccumulateT<T>(rows * cols);
  const T* first = static_cast<const T*>(args.x) + window.first * args.x_stride;
  const int64_t down = window.row_stride * args.x_stride;
  for (int64_t c = threadIdx.x % kWarp * kWidth; c < args.channels; c += kWarp * kWidth) {
    BlockedSum<Chunk> sum;
    for (int row = 0; row < rows; ++row) {
      for (int col = 0; col < cols; ++col) {
        sum.add(Chunk::load(first + row * down + col * args.x_stride + c));
      }
    }
    Chunk mean = sum.total();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) mean.value[i] /= count;
    mean.store(out + c);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBlocks)
    mean_forward(const WindowMean args) {
  T* out = static_cast<T*>(args.out);
  const int num_windows = int(args.views.num_windows());
  zero_rows(out, args.channels, num_windows, args.views.window_rows);
  const int64_t index = int64_t(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  if (index >= num_windows) return;
  const DeviceWindow window = window_at(args.views, int(index));
  out += index * args.channels;
  const bool full = window.rows == 2 && window.cols == 2;
  full ? forward_window<T, kWidth, 2>(args, window, out)
       : forward_window<T, kWidth, 0>(args, window, out);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp) mean_backward(const WindowMean args) {
  using Chunk = Elements<T, kWidth>;
  T* grad_x = static_cast<T*>(args.grad_x);
  const int num_windows = int(args.views.num_windows());
  zero_rows(grad_x, args.channels, args.views.num_tokens(), args.views.token_rows);
  const int64_t index = int64_t(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  if (index >= num_windows) return;
  const DeviceWindow window = window_at(args.views, int(index));
  const T* grad_out = static_cast<const T*>(args.grad_out) + index * args.grad_out_stride;
  T* first = grad_x + window.first * args.channels;
  const int64_t down = window.row_stride * args.channels;
  const AccumulateT<T> count = AccumulateT<T>(window.size());
  for (int64_t c = threadIdx.x % kWarp * kWidth; c < args.channels; c += kWarp * kWidth) {
    Chunk share = Chunk::load(grad_out + c);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) share.value[i] /= count;
    // A store waits for nothing, so a window of known size would gain nothing here.
    for (int row = 0; row < window.rows; ++row) {
      T* token = first + row * down + c;
      for (int col = 0; col < window.cols; ++col) share.store(token + col * args.channels);
    }
  }
}

}  // namespace

namespace cuda {

const char* window_mean_forward(const WindowMean& args, void* stream) {
  return with_width(args.dtype, args.channels, {{args.x, args.x_stride}}, [&](auto x, auto width) {
    using T = decltype(x);
    return launch(mean_forward<T, width>, grid_of(args), Traits::kWarps * kWarp, 0, stream, args);
  });
}

const char* window_mean_backward(const WindowMean& args, void* stream) {
  return with_width(args.dtype, args.channels, {{args.grad_out, args.grad_out_stride}},
                    [&](auto x, auto width) {
                      using T = decltype(x);
                      return launch(mean_backward<T, width>, grid_of(args), Traits::kWarps * kWarp,
                                    0, stream, args);
                    });
}

}  // namespace cuda
}  // namespace uhd
