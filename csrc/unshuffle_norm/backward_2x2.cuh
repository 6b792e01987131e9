// SPDX-License-Identifier: Apache-2.0
// Gradients of windows of 2 x 2 tokens: read once, and held in registers for the sums and the
// output. A thread owns a chunk of two slots, the left or the right ones: few enough registers for
// the warps that keep memory busy while others wait for a barrier.
#pragma once
#include "unshuffle_norm/chunks.cuh"

namespace uhd {
namespace {

constexpr int kRows = 2;

struct HeldTraits {
  // Rows of up to 1152 channels, in three blocks per SM of 288 threads with 72 registers or, for
  // float32, two of 576 with 56.
  static constexpr int kUsualThreads(size_t element) { return element == 2 ? 288 : 576; }
  static constexpr int kUsualBlocks(size_t element) { return element == 2 ? 3 : 2; }
  // Rows of up to 3072 half or 1536 float32 channels, with 80 registers.
  static constexpr int kMaxThreads = 768;
};

// What a thread owns of every window: a chunk in the slots of its column, left or right, of both
// rows.
template <class T>
struct Own {
  int col, c, size;  // size is 0 in a thread without channels

  UHD_DEVICE explicit Own(const UnshuffleNorm& args) {
    const int columns = int(ceil_div(args.channels, kPack<T>)), half = int(threadIdx.x) / columns;
    col = half < 2 ? half : 0;
    c = half < 2 ? (int(threadIdx.x) - half * columns) * kPack<T> : 0;
    size = half < 2 ? chunk_size<T>(args.channels, c) : 0;
  }
};

// Gradients of the norm's weight and bias at the channels of a thread, summed in shared memory:
// each thread has pieces of 16 bytes of its own there, a block of threads after the other, so that
// neighbours use neighbouring banks. In registers they would take those of half the warps.
template <class T>
class NormGradient {
 public:
  using S = AccumulateT<T>;
  using Piece = Chunk<S>;
  static constexpr int kPieces = kPack<T> / kPack<S>;      // of a chunk
  static constexpr int kBytes = 2 * kRows * kPieces * 16;  // of a thread

  UHD_DEVICE explicit NormGradient(S* shared) : first_(shared + threadIdx.x * kPack<S>) {
#pragma unroll
    for (int i = 0; i < 2 * kRows * kPieces; ++i) Piece::zero().store(at(i));
  }
  // Of the slot in a row: adds grad_z n and grad_z of the channels of a piece.
  UHD_DEVICE void add(int row, int piece, const S* grad_z, const S* n) {
    S *to_weight = at(2 * (row * kPieces + piece)), *to_bias = at(2 * (row * kPieces + piece) + 1);
    Piece weight = Piece::load(to_weight), bias = Piece::load(to_bias);
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) {
      weight.value[i] += grad_z[i] * n[i];
      bias.value[i] += grad_z[i];
    }
    weight.store(to_weight);
    bias.store(to_bias);
  }
  // Vectors lie element by element, so that neighbouring threads write side by side: channel i of
  // chunk column j at i * columns + j of its slot. sum_partials puts them back.
  UHD_DEVICE void store(const UnshuffleNorm& args, const Own<T>& own, bool vector) const {
    S* to = static_cast<S*>(args.partials) + blockIdx.x * 2 * args.merged_channels();
    const int64_t first = vector ? own.c / kPack<T> : own.c;
    const int64_t step = vector ? args.channels / kPack<T> : 1;
#pragma unroll 1
    for (int row = 0; row < kRows; ++row) {
      S* to_weight = to + (2 * row + own.col) * args.channels + first;
      S* to_bias = to_weight + args.merged_channels();
#pragma unroll 1
      for (int i = 0; i < own.size; ++i) {
        const int piece = 2 * (row * kPieces + i / kPack<S>);
        to_weight[i * step] = at(piece)[i % kPack<S>];
        to_bias[i * step] = at(piece + 1)[i % kPack<S>];
      }
    }
  }

 private:
  UHD_DEVICE S* at(int piece) const { return first_ + piece * int(blockDim.x) * kPack<S>; }
  S* first_;
};

// One window at the channels of a thread.
template <class T, bool kVector>
class HeldWindow {
 public:
  using S = AccumulateT<T>;

  UHD_DEVICE HeldWindow(const UnshuffleNorm& args, const Own<T>& own, const DeviceWindow& window,
                        int index)
      : args_(args),
        own_(own),
        window_(window),
        grad_z_(static_cast<const T*>(args.grad_z) + index * args.grad_z_stride) {
    // A slot without a token repeats the nearest.
    const int first = window.first + (window.cols > 1 ? own.col : 0);
    const T* x = static_cast<const T*>(args.x) + first * args.x_stride + own.c;
    const int64_t down = window.rows > 1 ? window.row_stride * args.x_stride : 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      x_bits_[row] = load_chunk(x + row * down, own.size, kVector);
      g_[row] = unpacked<T>(load_chunk(grad_z_ + channel(row, own.col), own.size, kVector));
    }
    if (args.grad_residual) {
      const T* from = static_cast<const T*>(args.grad_residual);
      from += index * args.grad_residual_stride + own.c;
      grad_residual_ = load_chunk(from, own.size, kVector);
    }
    rstd_ = static_cast<const S*>(args.rstd)[index];
    shift_ = -static_cast<const S*>(args.mean)[index] * rstd_;  // n is x * rstd + shift
  }

  UHD_DEVICE void sum(NormGradient<T>& gradient, S (&sums)[2]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      Chunk<T> n = unpacked<T>(x_bits_[row]);
#pragma unroll
      for (S& value : n.value) value = value * rstd_ + shift_;
      if (args_.partials) {
#pragma unroll
        for (int piece = 0; piece < NormGradient<T>::kPieces; ++piece) {
          const int i = piece * kPack<S>;
          gradient.add(row, piece, g_[row].value + i, n.value + i);
        }
      }
      weigh(g_[row], channel(row, own_.col));
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        sums[0] += g_[row].value[i];
        sums[1] += g_[row].value[i] * n.value[i];
      }
    }
    if (own_.size == 0) sums[0] = sums[1] = S(0);
  }

  UHD_DEVICE void store(const Means<S>& means) {
    const S share = inverse_size<S>(window_), slots = S(kSlots) * share;
    // rstd (g - slots (mean(g) + n mean(g n))) as rstd g + of_x x + rest
    const S of_x = -slots * rstd_ * means.gn * rstd_;
    const S rest = -slots * rstd_ * (means.g + shift_ * means.gn);
    if (own_.col >= window_.cols) return;
    const Chunk<T> of_mean = args_.grad_residual ? unpacked<T>(grad_residual_) : Chunk<T>::zero();
    T* to = static_cast<T*>(args_.grad_x) + (window_.first + own_.col) * args_.channels + own_.c;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= window_.rows) break;
      if (window_.size() < kSlots) add_other_slots(g_[row], row);
      const Chunk<T> x = unpacked<T>(x_bits_[row]);
      Chunk<T> grad;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const S others = x.value[i] * of_x + (of_mean.value[i] * share + rest);
        grad.value[i] = g_[row].value[i] * rstd_ + others;
      }
      store_chunk(to + row * (window_.row_stride * args_.channels), grad, own_.size, kVector);
    }
  }

 private:
  // In the window.
  UHD_DEVICE int channel(int row, int col) const {
    return (2 * row + col) * int(args_.channels) + own_.c;
  }
  // grad_z becomes g.
  UHD_DEVICE void weigh(Chunk<T>& grad_z, int k) const {
    if (args_.norm_weight == nullptr) return;
    const Chunk<T> weight = load_parameter<T>(args_.norm_weight, k, own_.size, kVector, S(1));
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) grad_z.value[i] *= weight.value[i];
  }
  // Of the other slots that the own token of a row fills, at an edge of the view.
  UHD_DEVICE void add_other_slots(Chunk<T>& sum, int row) const {
#pragma unroll 1  // rare, so short
    for (int slot = 2 * row + own_.col + 1; slot < kSlots; ++slot) {
      const bool same_row = window_.rows == 1 || slot / 2 == row;
      const bool same_col = window_.cols == 1 || slot % 2 == own_.col;
      if (!same_row || !same_col) continue;
      const int k = channel(slot / 2, slot % 2);
      Chunk<T> other = unpacked<T>(load_chunk(grad_z_ + k, own_.size, kVector));
      weigh(other, k);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) sum.value[i] += other.value[i];
    }
  }

  const UnshuffleNorm& args_;
  const Own<T>& own_;
  const DeviceWindow window_;
  const T* const grad_z_;
  uint4 x_bits_[kRows], grad_residual_ = make_uint4(0, 0, 0, 0);
  S rstd_, shift_;
  Chunk<T> g_[kRows];
};

template <class T, bool kVector, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads < HeldTraits::kMaxThreads
                                                ? HeldTraits::kUsualBlocks(sizeof(T))
                                                : 1) backward_2x2(const UnshuffleNorm args) {
  using S = AccumulateT<T>;
  zero_rows(static_cast<T*>(args.grad_x), args.channels, args.views.num_tokens(),
            args.views.token_rows);
  WindowWalk walk(args.views);
  const Own<T> own(args);
  NormGradient<T> gradient(dynamic_shared<S>());
  S* of_warps = dynamic_shared<S>() + blockDim.x * (NormGradient<T>::kBytes / sizeof(S));
  for (int turn = 0; walk.holds(turn); ++turn) {
    HeldWindow<T, kVector> held(args, own, walk.at(turn), int(walk.index(turn)));
    S sums[2] = {S(0), S(0)};
    held.sum(gradient, sums);
    S* shared = of_warps + turn % 2 * 2 * (blockDim.x / kWarp);
    held.store(means_over_block(sums, args, shared));
  }
  if (args.partials) gradient.store(args, own, kVector);
}

}  // namespace
}  // namespace uhd
