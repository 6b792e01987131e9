// SPDX-License-Identifier: Apache-2.0
// The lanes of a warp lie side by side along the outputs of the layer, 16 bytes each, and walk down
// the rows of products; bias and sums stay in registers. Any group is the same walk: a counter says
// where a row of h ends, the same for all lanes.
#include "common/column_sums.cuh"
#include "common/elements.cuh"
#include "linear_activation/activations.cuh"
#include "linear_activation/linear_activation.h"

namespace uhd {
namespace {

struct Traits {
  static constexpr int kWarps = 4;
  // Rows of products that are loaded before the first is used, and blocks that an SM must hold at
  // least, which bounds the registers. Six blocks are 24 warps with 48 KB under way, twice what the
  // memory of an H200 needs. In float64 arithmetic takes longer than memory, and its erfc needs the
  // registers.
  static constexpr int kRowsInFlight(size_t element) { return element == 8 ? 1 : 4; }
  static constexpr int kForwardBlocks(size_t element) { return element == 8 ? 4 : 6; }
  static constexpr int kBackwardBlocks(size_t element) { return element == 8 ? 4 : 6; }
  // Rows of products per warp in the forward pass: enough to repay the load of the bias, few enough
  // for 5000 warps of an image of 70 x 70 tokens.
  static constexpr int kProducts = 16;
};

// Where a thread works: its first output, and its block among those with the same outputs.
struct Place {
  int64_t column;
  int64_t block;
  int warp;
};

template <int kWidth>
UHD_HOST_DEVICE unsigned column_blocks(const LinearActivation& args) {
  return unsigned((args.width + kWarp * kWidth - 1) / (kWarp * kWidth));
}

template <int kWidth>
UHD_DEVICE Place place(const LinearActivation& args) {
  const unsigned columns = column_blocks<kWidth>(args), lane = threadIdx.x % kWarp;
  return {(int64_t(blockIdx.x % columns) * kWarp + lane) * kWidth, blockIdx.x / columns,
          int(threadIdx.x / kWarp)};
}

// Elements as they lie in memory. Those that wait for their turn stay so: widened, four rows of
// halves would take 128 registers instead of 64.
template <class T, int kWidth>
struct Packed {
  std::conditional_t<kWidth == 1, T, uint4> bits;

  UHD_DEVICE void load(const T* from) {
    if constexpr (kWidth == 1) {
      bits = *from;
    } else {
      bits = load_16(from);
    }
  }
  UHD_DEVICE Elements<T, kWidth> widened() const {
    Elements<T, kWidth> x;
    if constexpr (kWidth == 1) {
      x.value[0] = widen(bits);
    } else {
      x.unpack(bits);
    }
    return x;
  }
};

template <class T, int kWidth>
UHD_DEVICE Elements<T, kWidth> load_bias(const LinearActivation& args, int64_t column) {
  using Chunk = Elements<T, kWidth>;
  return args.bias ? Chunk::load(static_cast<const T*>(args.bias) + column) : Chunk::zero();
}

// ---- forward

UHD_HOST_DEVICE int64_t rows_per_warp(const LinearActivation& args) {
  return args.group < Traits::kProducts ? Traits::kProducts / args.group : 1;
}

template <class Activate, class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kForwardBlocks(sizeof(T)))
    activation_forward(const LinearActivation args) {
  using Chunk = Elements<T, kWidth>;
  using S = AccumulateT<T>;
  const Place at = place<kWidth>(args);
  const int64_t first = (at.block * Traits::kWarps + at.warp) * rows_per_warp(args);
  if (at.column >= args.width || first >= args.rows) return;
  const int64_t rows = min(rows_per_warp(args), args.rows - first);
  const int group = int(args.group);
  const T* u = static_cast<const T*>(args.u) + first * group * args.width + at.column;
  T* h = static_cast<T*>(args.h) + first * args.width + at.column;
  const Chunk shift = load_bias<T, kWidth>(args, at.column);
  const S scale = S(1) / S(group);
  constexpr int kAtOnce = Traits::kRowsInFlight(sizeof(T));
  Chunk sum = Chunk::zero();
  int in_group = 0;
  for (int64_t left = rows * group; left > 0; left -= kAtOnce) {
    Packed<T, kWidth> loaded[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j < left) loaded[j].load(u + j * args.width);
    }
    u += kAtOnce * args.width;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= left) break;
      Chunk x = loaded[j].widened();
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x.value[i] += shift.value[i];
      Activate::add_values(sum.value, x.value);
      if (++in_group < group) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.value[i] *= scale;
      sum.store(h);
      sum = Chunk::zero();
      h += args.width;
      in_group = 0;
    }
  }
}

// ---- backward

// The backward pass over `count` products, the first of which is the one number `in_group` of its
// group; the pointers are to the thread's outputs. Writes grad_u and returns its sums.
template <class Activate, class T, int kWidth>
UHD_DEVICE Elements<T, kWidth> backward_products(const LinearActivation& args,
                                                 const Elements<T, kWidth>& shift, int64_t count,
                                                 int in_group, const T* u, const T* grad_h,
                                                 T* grad_u) {
  using Chunk = Elements<T, kWidth>;
  using S = AccumulateT<T>;
  const int group = int(args.group);
  const S scale = S(1) / S(group);
  constexpr int kAtOnce = Traits::kRowsInFlight(sizeof(T));
  Chunk sum = Chunk::zero();
  for (int64_t left = count; left > 0; left -= kAtOnce) {
    Packed<T, kWidth> loaded[kAtOnce] = {}, shares[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= left) break;
      loaded[j].load(u + j * args.width);
      shares[j].load(grad_h);  // in the cache after the first of its group
      if (++in_group < group) continue;
      grad_h += args.grad_h_stride;
      in_group = 0;
    }
    u += kAtOnce * args.width;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= left) break;
      const Chunk x = loaded[j].widened();
      Chunk grad = shares[j].widened();
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        grad.value[i] *= scale * Activate::slope(x.value[i] + shift.value[i]);
        sum.value[i] += grad.value[i];
      }
      grad.store(grad_u + j * args.width);
    }
    grad_u += kAtOnce * args.width;
  }
  return sum;
}

// Adds the sums of a block's warps in their order and writes them as one row of partials.
template <class T, int kWidth>
UHD_DEVICE void write_partial(const LinearActivation& args, const Place& at,
                              Elements<T, kWidth> sum) {
  using S = AccumulateT<T>;
  using Piece = Elements<S, kWidth % kPack<S> == 0 ? kPack<S> : 1>;
  constexpr int kPiece = sizeof(Piece) / sizeof(S);
  S* mine = dynamic_shared<S>() + threadIdx.x * kWidth;
  S* partial = static_cast<S*>(args.partials) + at.block * args.width + at.column;
#pragma unroll
  for (int first = 0; first < kWidth; first += kPiece) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece.value[i] = sum.value[first + i];
    piece.store(mine + first);
  }
  __syncthreads();
  if (at.warp > 0 || at.column >= args.width) return;
#pragma unroll
  for (int first = 0; first < kWidth; first += kPiece) {
    Piece total = Piece::load(mine + first);
    for (int w = 1; w < Traits::kWarps; ++w) {
      const Piece other = Piece::load(mine + w * kWarp * kWidth + first);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) total.value[i] += other.value[i];
    }
    total.store(partial + first);
  }
}

// One block for each of args.blocks() and each block of columns; its warps share the products.
template <class Activate, class T, int kWidth>
__global__ void __launch_bounds__(Traits::kWarps* kWarp, Traits::kBackwardBlocks(sizeof(T)))
    activation_backward(const LinearActivation args) {
  using Chunk = Elements<T, kWidth>;
  const Place at = place<kWidth>(args);
  const int64_t first = at.block * args.rows_per_block();
  const int64_t rows = min(args.rows_per_block(), args.rows - first);
  const int64_t products = rows * args.group;
  const int64_t share = (products + Traits::kWarps - 1) / Traits::kWarps;
  const int64_t begin = min(at.warp * share, products), count = min(share, products - begin);
  Chunk sum = Chunk::zero();
  if (at.column < args.width) {
    const int64_t in_block = begin / args.group;  // the row of h
    const int64_t offset = (first * args.group + begin) * args.width + at.column;
    sum = backward_products<Activate, T, kWidth>(
        args, load_bias<T, kWidth>(args, at.column), count, int(begin - in_block * args.group),
        static_cast<const T*>(args.u) + offset,
        static_cast<const T*>(args.grad_h) + (first + in_block) * args.grad_h_stride + at.column,
        static_cast<T*>(args.grad_u) + offset);
  }
  if (args.partials) write_partial<T, kWidth>(args, at, sum);
}

const char* sum_partials(const LinearActivation& args, void* stream) {
  const char* error = nullptr;
  dispatch_dtype(args.dtype, [&](auto element) {
    using S = AccumulateT<decltype(element)>;
    error = launch_column_sums(static_cast<const S*>(args.partials), args.blocks(), args.width,
                               static_cast<S*>(args.grad_bias), stream);
  });
  return error;
}

constexpr const char* kTooLarge = "the group must be below 2^31";

}  // namespace

namespace cuda {

const char* linear_activation_forward(const LinearActivation& args, void* stream) {
  if (args.rows > 0 && args.group > INT32_MAX) return kTooLarge;
  const int64_t stride = args.width;
  return with_width(
      args.dtype, args.width, {{args.u, stride}, {args.bias, stride}, {args.h, stride}},
      [&](auto element, auto width) {
        using T = decltype(element);
        return dispatch_activation<T>(args.activation, [&](auto activate) {
          const int64_t rows = rows_per_warp(args) * Traits::kWarps;  // of h, per block
          const int64_t blocks = (args.rows + rows - 1) / rows * column_blocks<width>(args);
          return launch(activation_forward<decltype(activate), T, width>, blocks_for(blocks, 1),
                        Traits::kWarps * kWarp, 0, stream, args);
        });
      });
}

const char* linear_activation_backward(const LinearActivation& args, void* stream) {
  if (args.rows > 0 && args.group > INT32_MAX) return kTooLarge;
  const int64_t stride = args.width;
  const char* error = with_width(
      args.dtype, args.width,
      {{args.u, stride},
       {args.bias, stride},
       {args.grad_u, stride},
       {args.grad_h, args.grad_h_stride},
       {args.partials, stride}},
      [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int kThreads = Traits::kWarps * kWarp;
        const size_t shared = args.partials ? kThreads * width * sizeof(AccumulateT<T>) : 0;
        return dispatch_activation<T>(args.activation, [&](auto activate) {
          return launch(activation_backward<decltype(activate), T, width>,
                        blocks_for(args.blocks() * column_blocks<width>(args), 1), kThreads, shared,
                        stream, args);
        });
      });
  return error || !args.grad_bias ? error : sum_partials(args, stream);
}

}  // namespace cuda
}  // namespace uhd
