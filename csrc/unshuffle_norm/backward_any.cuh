// SPDX-License-Identifier: Apache-2.0
// Gradients of windows of any side, read from memory and then from the caches.
#pragma once
#include "unshuffle_norm/chunks.cuh"

namespace uhd {
namespace {

struct LoopTraits {
  // Windows of any side are loops over chunks; small windows leave few chunks to more threads.
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 2;  // what PartialTraits::kMaxBlocks gives an H100
};

template <class T>
struct WindowGradient {
  using S = AccumulateT<T>;
  const UnshuffleNorm& args;
  SlotRows<T> x;
  const T *grad_z, *grad_residual;
  S mean, rstd;
  bool vector;

  UHD_DEVICE WindowGradient(const UnshuffleNorm& args, int64_t index, bool vector)
      : args(args),
        x(args, window_at(args.views, int(index))),
        grad_z(static_cast<const T*>(args.grad_z) + index * args.grad_z_stride),
        grad_residual(args.grad_residual ? static_cast<const T*>(args.grad_residual) +
                                               index * args.grad_residual_stride
                                         : nullptr),
        mean(static_cast<const S*>(args.mean)[index]),
        rstd(static_cast<const S*>(args.rstd)[index]),
        vector(vector) {}

  UHD_DEVICE Chunk<T> normalised(const T* from, int size) const {
    Chunk<T> n = unpacked<T>(load_chunk(from, size, vector));
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) n.value[i] = (n.value[i] - mean) * rstd;
    return n;
  }

  // Also adds grad_z n and grad_z to the two rows of `partial`, unless it is null.
  UHD_DEVICE void sum(S (&sums)[2], S* partial) const {
    const int64_t slots = args.views.window * args.views.window, channels = args.channels;
    for_chunks<T>(slots, channels, [&](int64_t slot, int64_t c, int size) {
      const int64_t k = slot * channels + c;
      const Chunk<T> n = normalised(x.slot(slot) + c, size);
      const Chunk<T> grad = unpacked<T>(load_chunk(grad_z + k, size, vector));
      const Chunk<T> weight = load_parameter<T>(args.norm_weight, k, size, vector, S(1));
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const S g = grad.value[i] * weight.value[i];
        sums[0] += g;
        sums[1] += g * n.value[i];
        if (partial == nullptr || i >= size) continue;
        partial[k + i] += grad.value[i] * n.value[i];
        partial[slots * channels + k + i] += grad.value[i];
      }
    });
  }

  // The sum of grad_z * weight over the slots that the token at (r, c) fills: the last row and
  // column of a ragged window also fill those beyond the view.
  UHD_DEVICE Chunk<T> sum_of_slots(int r, int c, int64_t channel, int size) const {
    const int64_t f = args.views.window;
    const int64_t row_end = r + 1 == x.window.rows ? f : r + 1;
    const int64_t col_end = c + 1 == x.window.cols ? f : c + 1;
    Chunk<T> sum = Chunk<T>::zero();
    for (int64_t row = r; row < row_end; ++row) {
      for (int64_t col = c; col < col_end; ++col) {
        const int64_t k = (row * f + col) * args.channels + channel;
        const Chunk<T> grad = unpacked<T>(load_chunk(grad_z + k, size, vector));
        const Chunk<T> weight = load_parameter<T>(args.norm_weight, k, size, vector, S(1));
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) sum.value[i] += grad.value[i] * weight.value[i];
      }
    }
    return sum;
  }

  UHD_DEVICE S slots_of(int r, int c) const {
    const S down = r + 1 == x.window.rows ? S(args.views.window - r) : S(1);
    return down * (c + 1 == x.window.cols ? S(args.views.window - c) : S(1));
  }

  UHD_DEVICE void store(const Means<S>& means) const {
    const DeviceWindow& window = x.window;
    T* first = static_cast<T*>(args.grad_x) + window.first * args.channels;
    for_chunks<T>(window.size(), args.channels, [&](int64_t token, int64_t channel, int size) {
      const int r = int(token) / window.cols, c = int(token) % window.cols;
      const Chunk<T> n = normalised(x.token(r, c) + channel, size);
      const S slots = slots_of(r, c);
      Chunk<T> grad = sum_of_slots(r, c, channel, size), share = Chunk<T>::zero();
      if (grad_residual) {
        share = unpacked<T>(load_chunk(grad_residual + channel, size, vector));
      }
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const S centre = (n.value[i] * means.gn + means.g) * slots;
        grad.value[i] = (grad.value[i] - centre) * rstd + share.value[i] / S(window.size());
      }
      T* to = first + (int64_t(r) * window.row_stride + c) * args.channels + channel;
      store_chunk(to, grad, size, vector);
    });
  }
};

template <class T>
__global__ void __launch_bounds__(LoopTraits::kThreads, LoopTraits::kBlocksPerProcessor)
    backward_any(const UnshuffleNorm args, bool vector) {
  using S = AccumulateT<T>;
  zero_rows(static_cast<T*>(args.grad_x), args.channels, args.views.num_tokens(),
            args.views.token_rows);
  const int num_windows = int(args.views.num_windows());
  const int64_t merged = args.merged_channels();
  S* partial = nullptr;
  if (args.partials) {
    partial = static_cast<S*>(args.partials) + blockIdx.x * 2 * merged;
    // By the threads that will add to them: there is no barrier.
    for_chunks<T>(args.views.window * args.views.window, args.channels,
                  [&](int64_t slot, int64_t c, int size) {
                    const int64_t k = slot * args.channels + c;
                    for (int i = 0; i < size; ++i) partial[k + i] = partial[merged + k + i] = S(0);
                  });
  }
  int turn = 0;
  for (int64_t index = blockIdx.x; index < num_windows; index += gridDim.x, ++turn) {
    const WindowGradient<T> gradient(args, index, vector);
    S sums[2] = {S(0), S(0)};
    gradient.sum(sums, partial);
    S* shared = dynamic_shared<S>() + turn % 2 * 2 * (blockDim.x / kWarp);
    gradient.store(means_over_block(sums, args, shared));
  }
}

}  // namespace
}  // namespace uhd
