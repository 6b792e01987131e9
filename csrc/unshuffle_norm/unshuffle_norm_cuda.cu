// SPDX-License-Identifier: Apache-2.0
// Forward pass: one block per window at a time.
//
// Windows of 2 x 2 tokens, the usual ones, are read once and stay in registers for the mean, the
// centred squares and the output. Blocks loop over windows, as many as the device holds at once,
// and load the next window before they wait for the sums of the present one, so that memory stays
// busy. All other windows are read from memory, then from the caches.
#include <cmath>

#include "unshuffle_norm/chunks.cuh"

namespace uhd {
namespace {

struct Traits {
  // 512 threads: rows of up to 4096 half or 2048 float32 channels, with 128 registers a thread.
  static constexpr int kMaxThreads = 512;
  // Windows of any side are loops over chunks; small windows leave few chunks to more threads.
  static constexpr int kLoopThreads = 256;
  static constexpr int kLoopBlocks = 4;  // per SM: 64 registers, all that the loops need
};

template <class S>
UHD_DEVICE S reciprocal_deviation(S squares, const UnshuffleNorm& args) {
  const S variance = squares / S(args.merged_channels());
  return S(1) / std::sqrt(variance + S(args.eps));
}

template <class T>
UHD_DEVICE void zero_padding(const UnshuffleNorm& args, int num_windows) {
  using S = AccumulateT<T>;
  const int64_t rows = args.views.window_rows;
  zero_rows(static_cast<T*>(args.z), args.merged_channels(), num_windows, rows);
  if (args.residual) zero_rows(static_cast<T*>(args.residual), args.channels, num_windows, rows);
  zero_rows(static_cast<S*>(args.mean), 1, num_windows, rows);
  zero_rows(static_cast<S*>(args.rstd), 1, num_windows, rows);
}

template <class S>
UHD_DEVICE void store_statistics(const UnshuffleNorm& args, int64_t index, S mean, S rstd) {
  if (threadIdx.x > 0) return;
  static_cast<S*>(args.mean)[index] = mean;
  static_cast<S*>(args.rstd)[index] = rstd;
}

template <class T, class S = AccumulateT<T>>
UHD_DEVICE Chunk<T> normalised(const UnshuffleNorm& args, Chunk<T> chunk, S mean, S rstd, int64_t k,
                               int size, bool vector) {
  const Chunk<T> weight = load_parameter<T>(args.norm_weight, k, size, vector, S(1));
  const Chunk<T> bias = load_parameter<T>(args.norm_bias, k, size, vector, S(0));
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    chunk.value[i] = (chunk.value[i] - mean) * rstd * weight.value[i] + bias.value[i];
  }
  return chunk;
}

template <class T, class S = AccumulateT<T>>
UHD_DEVICE S sum_of(const Chunk<T>& chunk) {
  S sum = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) sum += chunk.value[i];
  return sum;
}

// Only the `size` channels of the row count: beyond it stand zeros, not means.
template <class T, class S = AccumulateT<T>>
UHD_DEVICE S centred_squares(const Chunk<T>& chunk, S mean, int size) {
  S sum = 0;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    const S difference = i < size ? chunk.value[i] - mean : S(0);
    sum += difference * difference;
  }
  return sum;
}

// ---- windows of 2 x 2 tokens

template <class T>
UHD_DEVICE Chunk<T> mean_of_slots(const uint4 (&bits)[kSlots], const DeviceWindow& window) {
  using S = AccumulateT<T>;
  Chunk<T> mean = unpacked<T>(bits[0]);
#pragma unroll
  for (int slot = 1; slot < kSlots; ++slot) {
    if (slot / 2 >= window.rows || slot % 2 >= window.cols) continue;
    const Chunk<T> token = unpacked<T>(bits[slot]);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) mean.value[i] += token.value[i];
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) mean.value[i] *= inverse_size<S>(window);
  return mean;
}

template <class T, bool kVector>
UHD_DEVICE void forward_window(const UnshuffleNorm& args, const uint4 (&bits)[kSlots],
                               const DeviceWindow& window, int64_t index, int c, int size) {
  using S = AccumulateT<T>;
  S* shared = dynamic_shared<S>();
  S mean[1] = {S(0)}, squares[1] = {S(0)};
#pragma unroll
  for (const uint4& slot : bits) mean[0] += sum_of<T>(unpacked<T>(slot));
  block_sum(mean, shared);
  mean[0] /= S(args.merged_channels());
#pragma unroll
  for (const uint4& slot : bits) {
    // Vectors are whole or, in a thread without a column, empty.
    if (!kVector || size > 0) {
      squares[0] += centred_squares<T>(unpacked<T>(slot), mean[0], kVector ? kPack<T> : size);
    }
  }
  block_sum(squares, shared + blockDim.x / kWarp);
  const S rstd = reciprocal_deviation(squares[0], args);
  store_statistics(args, index, mean[0], rstd);
  if (args.residual) {
    store_chunk(static_cast<T*>(args.residual) + index * args.channels + c,
                mean_of_slots<T>(bits, window), size, kVector);
  }
  T* z = static_cast<T*>(args.z) + index * args.merged_channels();
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t k = slot * args.channels + c;
    store_chunk(z + k,
                normalised<T>(args, unpacked<T>(bits[slot]), mean[0], rstd, k, size, kVector), size,
                kVector);
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(Traits::kMaxThreads) forward_2x2(const UnshuffleNorm args) {
  const int num_windows = int(args.views.num_windows());
  zero_padding<T>(args, num_windows);
  const int c = threadIdx.x * kPack<T>, size = chunk_size<T>(args.channels, c);
  int64_t index = blockIdx.x;
  if (index >= num_windows) return;
  DeviceWindow window = window_at(args.views, int(index));
  uint4 bits[kSlots];
  load_slots<T>(bits, args, window, c, size, kVector);
  while (true) {
    const int64_t next_index = index + gridDim.x;
    DeviceWindow next_window = window;
    uint4 next_bits[kSlots] = {bits[0], bits[1], bits[2], bits[3]};
    if (next_index < num_windows) {
      next_window = window_at(args.views, int(next_index));
      load_slots<T>(next_bits, args, next_window, c, size, kVector);
    }
    forward_window<T, kVector>(args, bits, window, index, c, size);
    if (next_index >= num_windows) return;
    index = next_index;
    window = next_window;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) bits[slot] = next_bits[slot];
  }
}

// ---- windows of any side

template <class T>
UHD_DEVICE Chunk<T> mean_of_tokens(const SlotRows<T>& x, int64_t c, int size, bool vector) {
  using S = AccumulateT<T>;
  Chunk<T> mean = Chunk<T>::zero();
  for (int row = 0; row < x.window.rows; ++row) {
    for (int col = 0; col < x.window.cols; ++col) {
      const Chunk<T> token = unpacked<T>(load_chunk(x.token(row, col) + c, size, vector));
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) mean.value[i] += token.value[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) mean.value[i] /= S(x.window.size());
  return mean;
}

template <class T>
__global__ void __launch_bounds__(Traits::kLoopThreads, Traits::kLoopBlocks)
    forward_any(const UnshuffleNorm args, bool vector) {
  using S = AccumulateT<T>;
  S* shared = dynamic_shared<S>();
  const int num_windows = int(args.views.num_windows());
  zero_padding<T>(args, num_windows);
  const int64_t slots = args.views.window * args.views.window, channels = args.channels;
  for (int64_t index = blockIdx.x; index < num_windows; index += gridDim.x) {
    const SlotRows<T> x(args, window_at(args.views, int(index)));
    S mean[1] = {S(0)}, squares[1] = {S(0)};
    for_chunks<T>(slots, channels, [&](int64_t slot, int64_t c, int size) {
      mean[0] += sum_of<T>(unpacked<T>(load_chunk(x.slot(slot) + c, size, vector)));
    });
    block_sum(mean, shared);
    mean[0] /= S(args.merged_channels());
    for_chunks<T>(slots, channels, [&](int64_t slot, int64_t c, int size) {
      const Chunk<T> chunk = unpacked<T>(load_chunk(x.slot(slot) + c, size, vector));
      squares[0] += centred_squares<T>(chunk, mean[0], size);
    });
    block_sum(squares, shared + blockDim.x / kWarp);
    const S rstd = reciprocal_deviation(squares[0], args);
    store_statistics(args, index, mean[0], rstd);
    T* z = static_cast<T*>(args.z) + index * args.merged_channels();
    for_chunks<T>(slots, channels, [&](int64_t slot, int64_t c, int size) {
      const Chunk<T> chunk = unpacked<T>(load_chunk(x.slot(slot) + c, size, vector));
      const int64_t k = slot * channels + c;
      store_chunk(z + k, normalised<T>(args, chunk, mean[0], rstd, k, size, vector), size, vector);
    });
    if (args.residual == nullptr) continue;
    T* residual = static_cast<T*>(args.residual) + index * channels;
    for_chunks<T>(1, channels, [&](int64_t, int64_t c, int size) {
      store_chunk(residual + c, mean_of_tokens(x, c, size, vector), size, vector);
    });
  }
}

// Two sums per warp in shared memory: see block_sum.
template <class T, class... Parameters, class... Arguments>
const char* launch_loop(void (*kernel)(Parameters...), const UnshuffleNorm& args, int threads,
                        void* stream, Arguments... arguments) {
  const size_t shared = 2 * size_t(threads / kWarp) * sizeof(AccumulateT<T>);
  const int64_t resident = resident_blocks(kernel, threads, shared);
  const int64_t blocks = args.views.window_rows < resident ? args.views.window_rows : resident;
  return launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, stream, args,
                arguments...);
}

}  // namespace

namespace cuda {

const char* unshuffle_norm_forward(const UnshuffleNorm& args, void* stream) {
  return with_width(args.dtype, args.channels,
                    {{args.x, args.x_stride}, {args.norm_weight, 0}, {args.norm_bias, 0}},
                    [&](auto element, auto width) {
                      using T = decltype(element);
                      constexpr bool kVector = width > 1;
                      if constexpr (sizeof(T) <= 4) {
                        if (holds_windows<T>(args, Traits::kMaxThreads)) {
                          const int threads = int(threads_for_columns<T>(args.channels));
                          return launch_loop<T>(forward_2x2<T, kVector>, args, threads, stream);
                        }
                      }
                      return launch_loop<T>(forward_any<T>, args, Traits::kLoopThreads, stream,
                                            kVector);
                    });
}

}  // namespace cuda
}  // namespace uhd
