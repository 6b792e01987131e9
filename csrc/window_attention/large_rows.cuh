// SPDX-License-Identifier: Apache-2.0
// The tokens of one window and head: where they are in device memory, and their way to shared
// memory and back.
#pragma once
#include "common/mma.cuh"
#include "window_attention/large_plan.cuh"

namespace uhd {
namespace {

// The packed index of the i-th token of a window. For fewer than 16 * 16 + 1 tokens in rows of at
// most 16.
class TokenMap {
 public:
  UHD_DEVICE static TokenMap raster(const DeviceWindow& window) {
    return TokenMap(window.first, window.row_stride, window.cols);
  }
  UHD_DEVICE static TokenMap window_order(const DeviceWindow& window) {
    return TokenMap(window.compact, window.cols, window.cols);
  }
  UHD_DEVICE int operator[](int i) const { return first_ + i + int(i * reciprocal_ >> 16) * skip_; }

 private:
  // i / cols is i * reciprocal >> 16: the reciprocal is too large by less than one, so the quotient
  // by less than 256 / 65536, and it would take 1 / 16 to reach the next integer.
  UHD_DEVICE TokenMap(int first, int row_stride, int cols)
      : first_(first), skip_(row_stride - cols), reciprocal_((65535u + cols) / cols) {}

  int first_, skip_;
  unsigned reciprocal_;
};

// The rows of one head in a tensor.
template <class T>
struct HeadRows {
  T* base;          // the head in token 0
  int token_bytes;  // so that an address is one instruction: see kLargestStride
  TokenMap tokens;

  UHD_DEVICE T* operator[](int i) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) +
                                wide_product(tokens[i], token_bytes));
  }
  // The same from a column on.
  UHD_DEVICE HeadRows from(int column) const { return {base + column, token_bytes, tokens}; }
};

// Strides between tokens in bytes fit in 32 bits.
constexpr int64_t kLargestStride = INT32_MAX / 2;

template <class T>
UHD_DEVICE HeadRows<const T> input_rows(const void* data, TokenStrides strides, TokenMap tokens,
                                        int head) {
  return {static_cast<const T*>(data) + head * strides.head, int(strides.token * sizeof(T)),
          tokens};
}

// The heads of a token lie side by side, and tokens so many elements apart.
template <class T, int kDim>
UHD_DEVICE HeadRows<T> output_rows(void* data, int64_t token_stride, TokenMap tokens, int head) {
  return {static_cast<T*>(data) + head * kDim, int(token_stride * sizeof(T)), tokens};
}

// What a block works on.
struct WindowAndHead {
  DeviceWindow window;
  int head, kv_head, tokens;
  int padded_tokens;  // in whole strips
};

// False for a block beyond the windows that there are.
UHD_DEVICE bool find_window(const WindowAttention& args, WindowAndHead& work) {
  const int heads = int(args.heads), index = int(blockIdx.x) / heads;
  if (index >= int(args.views.num_windows())) return false;
  work.window = window_at(args.views, index);
  work.head = int(blockIdx.x) - index * heads;
  work.kv_head = work.head / int(args.group);
  work.tokens = work.window.size();
  work.padded_tokens = (work.tokens + kStrip - 1) / kStrip * kStrip;
  return true;
}

// Threads that share out rows: each keeps to one chunk of 16 bytes, and goes down `step` rows at a
// time. So nothing is divided on the way; a few threads that would be in no whole row have none.
template <int kDim>
struct ChunkWalk {
  int row, column, step;

  UHD_DEVICE ChunkWalk(int thread, int threads) {
    constexpr int kChunks = Row<kDim>::kChunks;
    thread = opaque(thread);  // the products in between need all registers
    step = threads / kChunks;
    row = thread / kChunks;
    column = (thread - row * kChunks) * 8;
    if (row >= step) row = kMostTokens;
  }
  static constexpr int kMostTokens = 256;
};

// Starts to copy `rows` rows from the begin-th on; those beyond the last token become zeros.
template <class T, int kDim>
UHD_DEVICE void load_rows(T* shared, const HeadRows<const T>& from, int begin, int rows, int tokens,
                          ChunkWalk<kDim> at) {
  T* to = shared + at.row * Row<kDim>::kStride + at.column;
  const HeadRows<const T> rows_from = from.from(at.column);
#pragma unroll 1  // several rows' addresses at once would cost the registers of a whole strip
  for (; at.row < rows; at.row += at.step) {
    cp_async_16_or_zero(to, rows_from[begin + at.row], begin + at.row < tokens);
    to += at.step * Row<kDim>::kStride;
  }
}

// The same for all rows of a window, by all threads of the block.
template <class T, int kDim>
UHD_DEVICE void load_window(T* shared, const HeadRows<const T>& from, const WindowAndHead& work) {
  load_rows<T, kDim>(shared, from, 0, work.padded_tokens, work.tokens,
                     {int(threadIdx.x), int(blockDim.x)});
}

// The same for one strip, by one warp.
template <class T, int kDim>
UHD_DEVICE void load_strip(T* shared, const HeadRows<const T>& from, int begin,
                           const WindowAndHead& work) {
  load_rows<T, kDim>(shared, from, begin, kStrip, work.tokens, {int(threadIdx.x % kWarp), kWarp});
}

// For the copies of this thread; those of others need a barrier behind it.
UHD_DEVICE void wait_for_loads() {
  cp_async_commit();
  cp_async_wait<0>();
}

// Rounds a strip of accumulators, each row times its factor, and writes the rows that are tokens.
// They pass through kStrip rows of shared memory of this warp, so that memory sees 16 bytes at a
// time.
template <class T, int kDim>
UHD_DEVICE void store_strip(T* shared, const float (&strip)[kDim / 8][4], const float (&factor)[2],
                            const HeadRows<T>& to, int begin, int tokens) {
  constexpr int kChunks = Row<kDim>::kChunks, kStride = Row<kDim>::kStride;
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // what these rows held has been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = shared + (lane / 4 + 8 * half) * kStride + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      *reinterpret_cast<uint32_t*>(row + c * 8) =
          narrow_pair<T>(strip[c][2 * half] * factor[half], strip[c][2 * half + 1] * factor[half]);
    }
  }
  __syncwarp();
#pragma unroll 1  // as above
  for (ChunkWalk<kDim> at(lane, kWarp); at.row < min(kStrip, tokens - begin); at.row += at.step) {
    const T* from = shared + at.row * kStride + at.column;
    store_16(to[begin + at.row] + at.column, load_16(from));
  }
  __syncwarp();  // the next copy may come
}

}  // namespace
}  // namespace uhd
