// SPDX-License-Identifier: Apache-2.0
// What the kernels of unshuffle_norm share: rows in chunks, slots of a window, sums over a block.
//
// A chunk is 16 bytes of a row: kPack<T> channels, fewer in the last one of a row that is no
// multiple of it. Threads own whole chunks, so the order of every sum depends on the sizes alone:
// whether a chunk is moved by one access (`vector`) or element by element changes no bit.
#pragma once
#include "common/windows.cuh"
#include "unshuffle_norm/unshuffle_norm.h"

namespace uhd {
namespace {

template <class T>
using Chunk = Elements<T, kPack<T>>;

// Channels of the chunk that begins at channel c; 0 beyond the row.
template <class T>
UHD_DEVICE int chunk_size(int64_t channels, int64_t c) {
  const int64_t left = channels - c;
  return left >= kPack<T> ? kPack<T> : left > 0 ? int(left) : 0;
}

// Sixteen bytes of a tensor that is read once: they do not displace the norm's weights in L1.
// Volatile, or the compiler would move the loads of the next window behind the barrier they
// overlap.
UHD_DEVICE uint4 load_16_once(const void* from) {
#ifdef UHD_EMULATED
  return load_16(from);
#else
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(from));
  return bits;
#endif
}

// The bits of `size` elements, zeros after them; a whole chunk if `vector`, also where size is 0,
// as it is in a thread without channels, which stays at channel 0 and adds and stores nothing.
// Packed, they wait in half the registers.
template <class T>
UHD_DEVICE uint4 load_chunk(const T* from, int size, bool vector) {
  if (vector) return load_16_once(from);
  Chunk<T> chunk = Chunk<T>::zero();
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (i < size) chunk.value[i] = widen(from[i]);
  }
  return chunk.pack();
}

template <class T>
UHD_DEVICE void store_chunk(T* to, const Chunk<T>& chunk, int size, bool vector) {
  if (vector) {
    if (size > 0) chunk.store(to);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (i < size) to[i] = narrow<T>(chunk.value[i]);
  }
}

template <class T>
UHD_DEVICE Chunk<T> unpacked(uint4 bits) {
  Chunk<T> chunk;
  chunk.unpack(bits);
  return chunk;
}

// A chunk of the norm's weight or bias; all `otherwise` for one that is null. Every window reads
// them, and L1 keeps them: no copy per block, as shared memory would hold.
template <class T, class S = AccumulateT<T>>
UHD_DEVICE Chunk<T> load_parameter(const void* vector_of_s, int64_t k, int size, bool vector,
                                   S otherwise) {
  Chunk<T> chunk;
  const S* from = static_cast<const S*>(vector_of_s) + k;
  if (vector_of_s == nullptr) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) chunk.value[i] = otherwise;
  } else if (vector) {
#pragma unroll
    for (int i = 0; i < kPack<T>; i += kPack<S>) {
      Chunk<S> piece;
      piece.unpack(__ldg(reinterpret_cast<const uint4*>(from + i)));
#pragma unroll
      for (int j = 0; j < kPack<S>; ++j) chunk.value[i + j] = piece.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) chunk.value[i] = i < size ? __ldg(from + i) : otherwise;
  }
  return chunk;
}

// Replaces every value by its sum over the threads of the block, the same bits in each. There is
// one barrier: `shared`, kSums values per warp, must not be what the previous call used, because
// slower threads may still read it; what the call before that used is free.
template <int kSums, class S>
UHD_DEVICE void block_sum(S (&value)[kSums], S* shared) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    value[k] = warp_sum(value[k]);
    if (lane == 0) shared[threadIdx.x / kWarp * kSums + k] = value[k];
  }
  __syncthreads();
  // Every warp adds up all warps' sums, of which there are at most 32.
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    value[k] = warp_sum(lane < warps ? shared[lane * kSums + k] : S(0));
  }
}

// mean(g) and mean(g n) from their sums over the window.
template <class S>
struct Means {
  S g, gn;
};

template <class S>
UHD_DEVICE Means<S> means_over_block(S (&sums)[2], const UnshuffleNorm& args, S* shared) {
  block_sum(sums, shared);
  const S share = S(1) / S(args.merged_channels());
  return {sums[0] * share, sums[1] * share};
}

// ---- windows of any side, read several times

// The token in each slot of a window; a slot without one repeats the nearest token.
template <class T>
struct SlotRows {
  const T* first;
  int64_t stride;  // between tokens, in elements
  int64_t side;
  DeviceWindow window;

  UHD_DEVICE SlotRows(const UnshuffleNorm& args, const DeviceWindow& window)
      : first(static_cast<const T*>(args.x) + window.first * args.x_stride),
        stride(args.x_stride),
        side(args.views.window),
        window(window) {}

  UHD_DEVICE const T* token(int64_t r, int64_t c) const {
    return first + (r * window.row_stride + c) * stride;
  }
  UHD_DEVICE const T* slot(int64_t index) const {
    const int64_t r = index / side, c = index % side;
    return token(r < window.rows ? r : window.rows - 1, c < window.cols ? c : window.cols - 1);
  }
};

// Calls body(row, c, size) for the chunks of `rows` rows that this thread owns, always in the same
// order: `size` channels of that row from channel c on.
template <class T, class Body>
UHD_DEVICE void for_chunks(int64_t rows, int64_t channels, Body&& body) {
  const int64_t columns = ceil_div(channels, kPack<T>);
  for (int64_t i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int64_t row = i / columns, c = (i - row * columns) * kPack<T>;
    body(row, c, chunk_size<T>(channels, c));
  }
}

// ---- windows of 2 x 2 tokens, held in registers

constexpr int kSlots = 4;

// The windows blockIdx.x + turn * gridDim.x of a block, turn after turn. To find a window costs a
// warp a hundred instructions; here its lanes find one each, for as many turns.
class WindowWalk {
 public:
  UHD_DEVICE explicit WindowWalk(const ViewTable& views)
      : views_(views), num_windows_(int(views.num_windows())) {}

  // There are fewer than 2^31 windows, and blocks.
  UHD_DEVICE unsigned index(int turn) const { return blockIdx.x + unsigned(turn) * gridDim.x; }
  UHD_DEVICE bool holds(int turn) const { return index(turn) < unsigned(num_windows_); }
  UHD_DEVICE int num_windows() const { return num_windows_; }

  // By whole warps, with turns in their order. Only what is needed of 2 x 2 tokens is set.
  UHD_DEVICE DeviceWindow at(int turn) {
    if (turn % kWarp == 0) {
      const int mine = turn + int(threadIdx.x % kWarp);
      if (int64_t(mine) * gridDim.x + blockIdx.x < num_windows_) {
        const DeviceWindow found = window_at(views_, int(index(mine)));
        first_ = found.first;
        // Two rows are less than 2^31 tokens.
        shape_ = (found.rows > 1 ? 2 * found.row_stride : 0) + (found.cols > 1 ? 1 : 0);
      }
    }
    const int first = __shfl_sync(kFullWarp, first_, turn % kWarp);
    const int shape = __shfl_sync(kFullWarp, shape_, turn % kWarp);
    return {first, shape / 2, shape > 1 ? 2 : 1, 1 + shape % 2, 0};
  }

 private:
  const ViewTable& views_;
  int num_windows_;
  int first_ = 0, shape_ = 0;
};

// Whole warps for so many columns of chunks.
template <class T>
inline int64_t threads_for_columns(int64_t channels, int64_t columns_each = 1) {
  return ceil_div(columns_each * ceil_div(channels, kPack<T>), kWarp) * kWarp;
}

// One over the number of tokens present, 1, 2 or 4: to multiply by it is to divide.
template <class S>
UHD_DEVICE S inverse_size(const DeviceWindow& window) {
  return (window.rows > 1 ? S(0.5) : S(1)) * (window.cols > 1 ? S(0.5) : S(1));
}

}  // namespace
}  // namespace uhd
