// SPDX-License-Identifier: Apache-2.0
// Windows of side 1 to 4: a warp takes a tile of windows and some heads, one after another. There
// is neither shared memory nor a barrier: the tokens of a window never leave their warp, so the
// backward pass recomputes the probabilities, and writes every gradient once.
#include "window_attention/gradients.cuh"
#include "window_attention/head_dims.h"
#include "window_attention/small_products.cuh"
#include "window_attention/small_windows.h"

namespace uhd {
namespace {

struct Traits {
  // Warps do not work together; four a block leave the scheduler fine grains.
  static constexpr int kWarps = 4;
  // Heads of a warp, at most: the look-up of a tile then costs a tenth of the instructions, and
  // runs of 4 heads begin at whole 32-byte sectors for every head size.
  static constexpr int kMostHeads = 4;
  // Warps that an H100 runs at once, 16 on each of 132 multiprocessors. Fewer heads per warp fill
  // it for short sequences.
  static constexpr int64_t kWarpsToFill = 132 * 16;
  // Blocks of the backward pass that a multiprocessor must hold: four leave 128 registers, which
  // the larger heads cannot do with, three leave 168.
  static constexpr int kBackwardBlocks(int head_dim) { return head_dim <= 80 ? 4 : 3; }
  // So that strides in bytes fit in 32 bits.
  static constexpr int64_t kLargestStride = (int64_t{1} << 30) - 1;
  static constexpr float kLog2e = 1.4426950408889634f;
};

// ---- kernels

// What a warp does: a tile, and the heads [begin, end).
struct Work {
  SmallTile tile;
  int begin, end;
};

UHD_DEVICE Work find_work(const WindowAttention& args, int heads_each) {
  const int heads = int(args.heads);
  const unsigned runs = (heads - 1) / heads_each + 1;
  const int begin = int(blockIdx.x % runs) * heads_each;
  const int tile = int(blockIdx.x / runs) * Traits::kWarps + int(threadIdx.x / kWarp);
  return {find_tile(args.views, args.window_order, tile), begin, min(begin + heads_each, heads)};
}

template <class T, int kDim>
__global__ void __launch_bounds__(Traits::kWarps* kWarp)
    small_forward(const WindowAttention args, int heads_each) {
  using Fragments = RowFragments<T, kDim>;
  const int64_t row = args.heads * kDim;
  zero_rows(static_cast<T*>(args.out), row, args.views.num_tokens(), args.views.token_rows);
  const Work work = find_work(args, heads_each);
  const SmallTile& tile = work.tile;
  if (tile.present == 0) return;
  const RowScale scale = probability_scale();
#pragma unroll 1
  for (int head = work.begin; head < work.end; ++head) {
    const int kv_head = args.group == 1 ? head : head / int(args.group);
    const HeadRows<const T> q(args.q, args.q_strides, head), k(args.k, args.k_strides, kv_head),
        v(args.v, args.v_strides, kv_head);
    const HeadRows<T> out(args.out, {row, kDim}, head);
    Square p;
    dot_rows(Fragments(q, tile.row), Fragments(k, tile.row), p);
    softmax(p, tile, float(args.scale) * Traits::kLog2e);
    mix_rows<T, kDim>(Weights<T>(p, scale.factor), tile, scale,
                      {v, tile.column, out, tile.row_out});
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBackwardBlocks(kDim))
    small_backward(const WindowAttention args, int heads_each) {
  using Fragments = RowFragments<T, kDim>;
  zero_gradient_padding<T>(args);
  const Work work = find_work(args, heads_each);
  const SmallTile& tile = work.tile;
  if (tile.present == 0) return;
#pragma unroll 1
  for (int head = work.begin; head < work.end; ++head) {
    const HeadRows<const T> q(args.q, args.q_strides, head), k(args.k, args.k_strides, head),
        v(args.v, args.v_strides, head), grad_out(args.grad_out, args.grad_out_strides, head);
    const HeadRows<T> grad_q(args.grad_q, grad_q_strides(args), head),
        grad_k(args.grad_k, grad_kv_strides(args), head),
        grad_v(args.grad_v, grad_kv_strides(args), head);
    Square p, ds;
    dot_rows(Fragments(q, tile.row), Fragments(k, tile.row), p);
    dot_rows(Fragments(grad_out, tile.row_out), Fragments(v, tile.row), ds);
    softmax(p, tile, float(args.scale) * Traits::kLog2e);
    softmax_backward(p, tile, float(args.scale), ds);

    const RowScale p_scale = probability_scale();
    mix_rows<T, kDim>(Weights<T>(p, p_scale.factor).transposed(), tile, p_scale,
                      {grad_out, tile.column_out, grad_v, tile.row});
    RowScale ds_scale{};
    if constexpr (std::is_same_v<T, Float16>) ds_scale = window_scale(ds, tile);
    const Weights<T> weights(ds, ds_scale.factor);
    mix_rows<T, kDim>(weights, tile, ds_scale, {k, tile.column, grad_q, tile.row});
    mix_rows<T, kDim>(weights.transposed(), tile, ds_scale, {q, tile.column, grad_k, tile.row});
  }
}

// ---- launch

// Tiles that are enough for any views of so many windows.
int64_t num_tiles(const ViewTable& views) {
  return views.window_rows / (kSlots >> slot_shift(views.window)) + views.num_views;
}

int64_t num_blocks(const WindowAttention& args, int heads_each) {
  const int64_t runs = ceil_div(args.heads, heads_each);
  // Padding is zeroed even if there is no window at all.
  return runs * std::max<int64_t>(1, ceil_div(num_tiles(args.views), Traits::kWarps));
}

int choose_heads_each(const WindowAttention& args) {
  int heads_each = Traits::kMostHeads;
  while (heads_each > 1 && num_tiles(args.views) * args.heads < Traits::kWarpsToFill * heads_each) {
    heads_each /= 2;
  }
  return heads_each;
}

const char* launch_blocks(void (*kernel)(WindowAttention, int), const WindowAttention& args,
                          void* stream) {
  const int heads_each = choose_heads_each(args);
  return launch(kernel, blocks_for(num_blocks(args, heads_each), 1), Traits::kWarps * kWarp, 0,
                stream, args, heads_each);
}

// A tensor that is not there fits.
bool rows_fit(const void* pointer, TokenStrides strides) {
  bool fit = true;
  for (int64_t stride : {strides.token, strides.head}) {
    fit = fit && aligned_16<BFloat16>({pointer, stride}) && stride <= Traits::kLargestStride;
  }
  return fit;
}

}  // namespace

namespace cuda {

bool small_windows_fit(const WindowAttention& args) {
  const TokenStrides out = {args.heads * args.head_dim, args.head_dim};
  const TokenStrides grad_q = {args.grad_q_stride, args.head_dim};
  const TokenStrides grad_kv = {args.grad_kv_stride, args.head_dim};
  const auto exists = [](auto, auto) -> const char* { return nullptr; };
  bool fit = (args.dtype == DType::kBFloat16 || args.dtype == DType::kFloat16) &&
             args.views.window >= 1 && args.views.window <= 4 &&
             with_half_and_head_dim(args, exists) == nullptr && rows_fit(args.q, args.q_strides) &&
             rows_fit(args.k, args.k_strides) && rows_fit(args.v, args.v_strides) &&
             rows_fit(args.grad_out, args.grad_out_strides) && rows_fit(args.out, out) &&
             rows_fit(args.grad_q, grad_q) && rows_fit(args.grad_k, grad_kv) &&
             rows_fit(args.grad_v, grad_kv);
  // No warp adds up the gradients of a key over the heads of a group.
  fit = fit && (args.grad_out == nullptr || args.group == 1);
  // Tiles and blocks are counted in 32 bits.
  return fit && num_tiles(args.views) <= INT32_MAX - Traits::kWarps &&
         num_blocks(args, choose_heads_each(args)) <= INT32_MAX;
}

const char* small_windows_forward(const WindowAttention& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto element, auto dim) {
    return launch_blocks(small_forward<decltype(element), dim.value>, args, stream);
  });
}

const char* small_windows_backward(const WindowAttention& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto element, auto dim) {
    return launch_blocks(small_backward<decltype(element), dim.value>, args, stream);
  });
}

}  // namespace cuda
}  // namespace uhd
