// SPDX-License-Identifier: Apache-2.0
// One warp per four slots of a window: for f = 2 that is the window. Its lanes lie side by side
// along the channels, and each has the four loads of its place in flight. That neighbouring tokens
// are contiguous is not used: an access is 512 contiguous bytes either way, and this one also
// serves rows with a stride and windows that repeat tokens.
#include "common/windows.cuh"
#include "common/words.cuh"
#include "pixel_unshuffle/pixel_unshuffle.h"

namespace uhd {
namespace {

struct Traits {
  // Few registers and no shared memory, so any size fills an SM; 8 warps a block keep the number
  // of blocks of a small call near the number of SMs.
  static constexpr int kWarps = 8;
  // 64 bytes in flight per lane: with 32 warps on an SM, 64 KB, more than memory needs to stream.
  static constexpr int kSlots = 4;
  // 64 registers a thread. Without a bound, nvcc 13.0 spills at 48 for compute capability 12.0.
  static constexpr int kBackwardBlocks = 4;
};

// The slots that a warp works on, in raster order from `slot` on: at most kSlots of a window.
struct SlotGroup {
  int64_t window, slot;
  int64_t row, col;  // of the first slot
  int count;
};

UHD_HOST_DEVICE int64_t groups_per_window(const PixelUnshuffle& args) {
  return ceil_div(args.views.window * args.views.window, Traits::kSlots);
}

UHD_DEVICE SlotGroup slot_group(const PixelUnshuffle& args) {
  const int64_t f = args.views.window, groups = groups_per_window(args);
  const int64_t warp = int64_t(blockIdx.x) * Traits::kWarps + threadIdx.x / kWarp;
  const int64_t window = warp / groups, slot = (warp - window * groups) * Traits::kSlots;
  const int64_t left = f * f - slot;
  return {window, slot, slot / f, slot % f, left < Traits::kSlots ? int(left) : Traits::kSlots};
}

// Calls body(i, row, col) for the slots of a group, i a constant.
template <class Body>
UHD_DEVICE void for_slots(const SlotGroup& group, int64_t f, Body&& body) {
  int64_t row = group.row, col = group.col;
#pragma unroll
  for (int i = 0; i < Traits::kSlots; ++i) {
    if (i < group.count) body(i, row, col);
    if (++col == f) {
      col = 0;
      ++row;
    }
  }
}

dim3 grid_of(const PixelUnshuffle& args) {
  // One block at least, for the padding rows of a call without windows.
  const int64_t warps = args.views.window_rows * groups_per_window(args);
  return blocks_for(warps > 0 ? warps : 1, Traits::kWarps);
}

// A warp copies the rows from[i] to to[i], i < count, each of `channels` words.
template <class Word>
struct RowCopies {
  const Word* from[Traits::kSlots];
  Word* to[Traits::kSlots];

  UHD_DEVICE void run(int count, int64_t channels) const {
    for (int64_t c = threadIdx.x % kWarp; c < channels; c += kWarp) {
      Word word[Traits::kSlots];
#pragma unroll
      for (int i = 0; i < Traits::kSlots; ++i) {
        if (i < count) word[i] = from[i][c];
      }
#pragma unroll
      for (int i = 0; i < Traits::kSlots; ++i) {
        if (i < count) to[i][c] = word[i];
      }
    }
  }
};

// channels and x_stride of args are in words.
template <class Word>
__global__ void __launch_bounds__(Traits::kWarps* kWarp)
    unshuffle_forward(const PixelUnshuffle args) {
  const int64_t f = args.views.window, merged = f * f * args.channels;
  const int num_windows = int(args.views.num_windows());
  zero_rows(static_cast<Word*>(args.out), merged, num_windows, args.views.window_rows);
  const SlotGroup group = slot_group(args);
  if (group.window >= num_windows) return;
  const DeviceWindow window = window_at(args.views, int(group.window));
  RowCopies<Word> rows{};
  for_slots(group, f, [&](int i, int64_t r, int64_t c) {
    // A slot that has no token repeats the nearest one.
    const int row = r < window.rows ? int(r) : window.rows - 1;
    const int col = c < window.cols ? int(c) : window.cols - 1;
    const int token = window.first + row * window.row_stride + col;
    rows.from[i] = static_cast<const Word*>(args.x) + token * args.x_stride;
    rows.to[i] =
        static_cast<Word*>(args.out) + group.window * merged + (group.slot + i) * args.channels;
  });
  rows.run(group.count, args.channels);
}

// The gradient of the token at (r, c) of a ragged window: the sum over the slots that repeat it,
// its own, and for the last row or column those beyond the edge of the view.
template <class T, int kWidth>
UHD_DEVICE void sum_slots(const PixelUnshuffle& args, const DeviceWindow& window, int64_t r,
                          int64_t c, const T* grad_out, T* grad_token) {
  using Chunk = Elements<T, kWidth>;
  const int64_t f = args.views.window;
  const int64_t row_end = r + 1 == window.rows ? f : r + 1;
  const int64_t col_end = c + 1 == window.cols ? f : c + 1;
  for (int64_t k = threadIdx.x % kWarp * kWidth; k < args.channels; k += kWarp * kWidth) {
    Chunk sum = Chunk::zero();
#pragma unroll 1  // few windows are ragged: registers count for more
    for (int64_t row = r; row < row_end; ++row) {
#pragma unroll 1
      for (int64_t col = c; col < col_end; ++col) {
        const Chunk slot = Chunk::load(grad_out + (row * f + col) * args.channels + k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum.value[i] += slot.value[i];
      }
    }
    sum.store(grad_token + k);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBackwardBlocks)
    unshuffle_backward(const PixelUnshuffle args) {
  using Word = std::conditional_t<kWidth == 1, T, Word16>;
  const int64_t f = args.views.window;
  T* grad_x = static_cast<T*>(args.grad_x);
  zero_rows(grad_x, args.channels, args.views.num_tokens(), args.views.token_rows);
  const SlotGroup group = slot_group(args);
  if (group.window >= args.views.num_windows()) return;
  const DeviceWindow window = window_at(args.views, int(group.window));
  const T* grad_out = static_cast<const T*>(args.grad_out) + group.window * args.grad_out_stride;
  const auto token = [&](int64_t row, int64_t col) {
    return grad_x + (window.first + row * window.row_stride + col) * args.channels;
  };
  if (window.rows == f && window.cols == f) {
    RowCopies<Word> rows{};
    for_slots(group, f, [&](int i, int64_t row, int64_t col) {
      rows.from[i] = reinterpret_cast<const Word*>(grad_out + (group.slot + i) * args.channels);
      rows.to[i] = reinterpret_cast<Word*>(token(row, col));
    });
    rows.run(group.count, args.channels / kWidth);
    return;
  }
  for (int64_t slot = group.slot; slot < group.slot + group.count; ++slot) {
    const int64_t row = slot / f, col = slot % f;
    if (row < window.rows && col < window.cols) {
      sum_slots<T, kWidth>(args, window, row, col, grad_out, token(row, col));
    }
  }
}

}  // namespace

namespace cuda {

const char* pixel_unshuffle_forward(const PixelUnshuffle& args, void* stream) {
  if (args.channels == 0) return nullptr;  // nor does anything bound f then
  const auto run = [&](auto word, int64_t elements) {
    PixelUnshuffle in_words = args;
    in_words.channels /= elements;
    in_words.x_stride /= elements;
    return launch(unshuffle_forward<decltype(word)>, grid_of(args), Traits::kWarps * kWarp, 0,
                  stream, in_words);
  };
  return with_word(args.dtype, args.channels, {{args.x, args.x_stride}}, run);
}

const char* pixel_unshuffle_backward(const PixelUnshuffle& args, void* stream) {
  if (args.channels == 0) return nullptr;
  const auto run = [&](auto x, auto width) {
    return launch(unshuffle_backward<decltype(x), width>, grid_of(args), Traits::kWarps * kWarp, 0,
                  stream, args);
  };
  return with_width(args.dtype, args.channels, {{args.grad_out, args.grad_out_stride}}, run);
}

}  // namespace cuda
}  // namespace uhd
