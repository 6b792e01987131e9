// SPDX-License-Identifier: Apache-2.0
// Gradients of windows of 2 x 2 tokens: read once, held in registers for the sums and the output,
// with the next window under way meanwhile.
#pragma once
#include "unshuffle_norm/chunks.cuh"

namespace uhd {
namespace {

struct HeldTraits {
  // 384 threads: rows of up to 3072 half or 1536 float32 channels, with 168 registers a thread, of
  // which the sums of the norm's gradients take 64.
  static constexpr int kMaxThreads = 384;
};

// What one thread needs of a window.
template <class T>
struct Held {
  using S = AccumulateT<T>;
  DeviceWindow window;
  uint4 x[kSlots], grad_z[kSlots], grad_residual;
  S mean, rstd;

  UHD_DEVICE void load(const UnshuffleNorm& args, int64_t index, int c, int size, bool vector) {
    window = window_at(args.views, int(index));
    load_slots<T>(x, args, window, c, size, vector);
    const T* from = static_cast<const T*>(args.grad_z) + index * args.grad_z_stride + c;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      grad_z[slot] = load_chunk(from + slot * args.channels, size, vector);
    }
    grad_residual = make_uint4(0, 0, 0, 0);
    if (args.grad_residual) {
      from = static_cast<const T*>(args.grad_residual) + index * args.grad_residual_stride + c;
      grad_residual = load_chunk(from, size, vector);
    }
    mean = static_cast<const S*>(args.mean)[index];
    rstd = static_cast<const S*>(args.rstd)[index];
  }
};

// Gradients of the norm's weight and bias at the channels of a thread.
template <class T>
struct NormGradient {
  Chunk<T> weight[kSlots], bias[kSlots];

  UHD_DEVICE void clear() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) weight[slot] = bias[slot] = Chunk<T>::zero();
  }
  // Vectors lie element by element, so that neighbouring threads write side by side: channel i of
  // chunk column j at i * columns + j of its slot. sum_partials puts them back.
  UHD_DEVICE void store(const UnshuffleNorm& args, int c, int size, bool vector) const {
    using S = AccumulateT<T>;
    S* row = static_cast<S*>(args.partials) + blockIdx.x * 2 * args.merged_channels();
    const int64_t first = vector ? threadIdx.x : c, step = vector ? args.channels / kPack<T> : 1;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      S* to_weight = row + slot * args.channels + first;
      S* to_bias = to_weight + args.merged_channels();
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        if (i >= size) continue;
        to_weight[i * step] = weight[slot].value[i];
        to_bias[i * step] = bias[slot].value[i];
      }
    }
  }
};

template <class T>
UHD_DEVICE void sum_window(const UnshuffleNorm& args, const Held<T>& held, int c, int size,
                           bool vector, NormGradient<T>& gradient, AccumulateT<T> (&sums)[2]) {
  using S = AccumulateT<T>;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const Chunk<T> x = unpacked<T>(held.x[slot]), grad_z = unpacked<T>(held.grad_z[slot]);
    const Chunk<T> weight =
        load_parameter<T>(args.norm_weight, slot * args.channels + c, size, vector, S(1));
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const S n = (x.value[i] - held.mean) * held.rstd;
      const S g = grad_z.value[i] * weight.value[i];
      gradient.weight[slot].value[i] += grad_z.value[i] * n;
      gradient.bias[slot].value[i] += grad_z.value[i];
      sums[0] += g;
      sums[1] += g * n;
    }
  }
}

// Adds grad_z * weight of a slot.
template <class T>
UHD_DEVICE void add_slot(Chunk<T>& sum, const UnshuffleNorm& args, const Held<T>& held, int slot,
                         int c, int size, bool vector) {
  using S = AccumulateT<T>;
  const Chunk<T> grad_z = unpacked<T>(held.grad_z[slot]);
  const Chunk<T> weight =
      load_parameter<T>(args.norm_weight, slot * args.channels + c, size, vector, S(1));
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) sum.value[i] += grad_z.value[i] * weight.value[i];
}

// One token at a time: all four would take 32 registers.
template <class T>
UHD_DEVICE void store_window(const UnshuffleNorm& args, const Held<T>& held, int c, int size,
                             bool vector, const Means<AccumulateT<T>>& means) {
  using S = AccumulateT<T>;
  const DeviceWindow& window = held.window;
  const bool one_row = window.rows == 1, one_col = window.cols == 1;
  const S share = inverse_size<S>(window), slots = S(kSlots) * share;
  T* first = static_cast<T*>(args.grad_x) + window.first * args.channels + c;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const bool top = slot < 2, left = slot % 2 == 0;
    if ((one_row && !top) || (one_col && !left)) continue;
    Chunk<T> grad = Chunk<T>::zero();
    add_slot(grad, args, held, slot, c, size, vector);
    if (left && one_col) add_slot(grad, args, held, slot + 1, c, size, vector);
    if (top && one_row) add_slot(grad, args, held, slot + 2, c, size, vector);
    if (slot == 0 && one_row && one_col) add_slot(grad, args, held, 3, c, size, vector);
    const Chunk<T> x = unpacked<T>(held.x[slot]), of_mean = unpacked<T>(held.grad_residual);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const S n = (x.value[i] - held.mean) * held.rstd;
      const S centre = (n * means.gn + means.g) * slots;
      grad.value[i] = (grad.value[i] - centre) * held.rstd + of_mean.value[i] * share;
    }
    const int64_t token = (top ? 0 : window.row_stride) + (left ? 0 : 1);
    store_chunk(first + token * args.channels, grad, size, vector);
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(HeldTraits::kMaxThreads) backward_2x2(const UnshuffleNorm args) {
  using S = AccumulateT<T>;
  zero_rows(static_cast<T*>(args.grad_x), args.channels, args.views.num_tokens(),
            args.views.token_rows);
  const int num_windows = int(args.views.num_windows());
  const int c = threadIdx.x * kPack<T>, size = chunk_size<T>(args.channels, c);
  NormGradient<T> gradient;
  gradient.clear();
  Held<T> next;
  int64_t index = blockIdx.x;
  if (index < num_windows) next.load(args, index, c, size, kVector);
  for (int turn = 0; index < num_windows; ++turn) {
    const Held<T> held = next;
    index += gridDim.x;
    // Element by element it would need more registers than there are.
    if (kVector && index < num_windows) next.load(args, index, c, size, kVector);
    S sums[2] = {S(0), S(0)};
    sum_window(args, held, c, size, kVector, gradient, sums);
    S* shared = dynamic_shared<S>() + turn % 2 * 2 * (blockDim.x / kWarp);
    store_window(args, held, c, size, kVector, means_over_block(sums, args, shared));
    if (!kVector && index < num_windows) next.load(args, index, c, size, kVector);
  }
  if (args.partials) gradient.store(args, c, size, kVector);
}

}  // namespace
}  // namespace uhd
