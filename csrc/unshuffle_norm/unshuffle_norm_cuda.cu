// SPDX-License-Identifier: Apache-2.0
// Forward pass: one block per window at a time.
//
// Windows of 2 x 2 tokens, the usual ones, are read once and stay in registers for their statistics
// and the output. Blocks loop over windows, as many as the device holds at once, and load the next
// window before they wait for the sums of the present one, so that memory stays busy. All other
// windows are read from memory, then from the caches.
#include <cmath>

#include "common/blocked_sum.h"
#include "unshuffle_norm/chunks.cuh"

namespace uhd {
namespace {

struct Traits {
  // 512 threads: rows of up to 4096 half or 2048 float32 channels. Vectors have 96 registers a
  // thread, as if there were 640: 20 warps of an SM then have 40 KB of their next windows under
  // way, twice what the memory of an H200 needs. Element by element it takes 128.
  static constexpr int kMaxThreads = 512;
  static constexpr int kBound(bool vector) { return vector ? 640 : kMaxThreads; }
  // Windows of any side are loops over chunks; small windows leave few chunks to more threads.
  static constexpr int kLoopThreads = 256;
  // Per SM: 80 registers. With 64 the assembler for compute capability 10.0 and 12.0 spills.
  static constexpr int kLoopBlocks = 3;
};

template <class S>
UHD_DEVICE S reciprocal_deviation(S squares, const UnshuffleNorm& args) {
  return reciprocal_root(squares / S(args.merged_channels()) + S(args.eps));
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

// (x - mean) * rstd is x * rstd + shift, one instruction.
template <class T, class S = AccumulateT<T>>
UHD_DEVICE Chunk<T> normalised(const UnshuffleNorm& args, Chunk<T> chunk, S rstd, S shift,
                               int64_t k, int size, bool vector) {
  const Chunk<T> weight = load_parameter<T>(args.norm_weight, k, size, vector, S(1));
  const Chunk<T> bias = load_parameter<T>(args.norm_bias, k, size, vector, S(0));
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    chunk.value[i] = (chunk.value[i] * rstd + shift) * weight.value[i] + bias.value[i];
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

// The four slots of a window at the chunk of a thread, as they lie in memory.
template <class T>
struct Slots {
  uint4 bits[kSlots];

  UHD_DEVICE void load(const UnshuffleNorm& args, const DeviceWindow& window, int c, int size,
                       bool vector) {
    const T* first = static_cast<const T*>(args.x) + window.first * args.x_stride + c;
    const int64_t right = window.cols > 1 ? args.x_stride : 0;
    const int64_t down = window.rows > 1 ? window.row_stride * args.x_stride : 0;
    bits[0] = load_chunk<T>(first, size, vector);
    bits[1] = load_chunk<T>(first + right, size, vector);
    bits[2] = load_chunk<T>(first + down, size, vector);
    bits[3] = load_chunk<T>(first + down + right, size, vector);
  }
};

// Mean and variance of the values of all threads, `size` channels of four slots in each. A warp
// sums the squares of its values about their own mean; a second sum, over warps, adds those of the
// means about the mean of all. So there is one barrier, and no digits are lost where the mean is
// large.
template <class T, bool kVector>
class Moments {
 public:
  using S = AccumulateT<T>;
  S mean, variance;

  UHD_DEVICE explicit Moments(const UnshuffleNorm& args)
      : in_all_(S(1) / S(args.merged_channels())),
        in_mine_(S(1) / values_in(args, threadIdx.x / kWarp)),
        share_(values_in(args, threadIdx.x % kWarp) * in_all_) {}

  // As for block_sum, two buffers of two values per warp must take turns.
  UHD_DEVICE void compute(const Chunk<T> (&x)[kSlots], S sum, int size, S* shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const S of_warp = warp_sum(size > 0 ? sum : S(0)) * in_mine_;
    S squares = 0;
#pragma unroll
    for (const Chunk<T>& chunk : x) {
      squares += centred_squares<T>(chunk, of_warp, kVector ? kPack<T> : size);
    }
    squares = warp_sum(size > 0 ? squares : S(0));
    if (lane == 0) shared[2 * warp] = of_warp, shared[2 * warp + 1] = squares;
    __syncthreads();
    const S its_mean = lane < warps ? shared[2 * lane] : S(0);
    const S its_squares = lane < warps ? shared[2 * lane + 1] : S(0);
    mean = warp_sum(its_mean * share_);
    const S apart = its_mean - mean;
    variance = warp_sum(its_squares * in_all_ + share_ * apart * apart);
  }

 private:
  UHD_DEVICE static S values_in(const UnshuffleNorm& args, int warp) {
    const int first = warp * kWarp * kPack<T>, left = int(args.channels) - first;
    return S(kSlots * (left < 0 ? 0 : left < kWarp * kPack<T> ? left : kWarp * kPack<T>));
  }

  S in_all_, in_mine_;  // to multiply by
  S share_;             // of the warp whose sums this lane reads in the values of all
};

template <class T, bool kVector>
UHD_DEVICE void forward_window(const UnshuffleNorm& args, const Chunk<T> (&x)[kSlots],
                               Moments<T, kVector>& moments, int index, int c, int size,
                               AccumulateT<T>* shared) {
  using S = AccumulateT<T>;
  const int channels = int(args.channels);
  Chunk<T> sum;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    sum.value[i] = (x[0].value[i] + x[1].value[i]) + (x[2].value[i] + x[3].value[i]);
  }
  const S of_thread = sum_of<T>(sum);
  if (args.residual) {
    // Slots without a token repeat one in equal numbers, so the mean of all is that of the tokens.
#pragma unroll
    for (S& value : sum.value) value *= S(0.25);
    T* residual = static_cast<T*>(args.residual) + int64_t(index) * channels;
    store_chunk(residual + c, sum, size, kVector);
  }
  moments.compute(x, of_thread, size, shared);
  const S rstd = reciprocal_root(moments.variance + S(args.eps)), shift = -moments.mean * rstd;
  store_statistics(args, index, moments.mean, rstd);
  T* z = static_cast<T*>(args.z) + int64_t(index) * (kSlots * channels) + c;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int k = slot * channels + c;
    store_chunk(z, normalised<T>(args, x[slot], rstd, shift, k, size, kVector), size, kVector);
    z += channels;
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(Traits::kBound(kVector)) forward_2x2(const UnshuffleNorm args) {
  using S = AccumulateT<T>;
  WindowWalk walk(args.views);
  zero_padding<T>(args, walk.num_windows());
  const int column = threadIdx.x * kPack<T>, size = chunk_size<T>(args.channels, column);
  const int c = size > 0 ? column : 0;
  Moments<T, kVector> moments(args);
  Slots<T> next;
  if (walk.holds(0)) next.load(args, walk.at(0), c, size, kVector);
  for (int turn = 0; walk.holds(turn); ++turn) {
    Chunk<T> x[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) x[slot] = unpacked<T>(next.bits[slot]);
    if (walk.holds(turn + 1)) next.load(args, walk.at(turn + 1), c, size, kVector);
    S* shared = dynamic_shared<S>() + turn % 2 * 2 * (blockDim.x / kWarp);
    forward_window<T, kVector>(args, x, moments, int(walk.index(turn)), c, size, shared);
  }
}

// ---- windows of any side

template <class T>
UHD_DEVICE Chunk<T> mean_of_tokens(const SlotRows<T>& x, int64_t c, int size, bool vector) {
  using S = AccumulateT<T>;
  BlockedSum<Chunk<T>> sum;
  for (int row = 0; row < x.window.rows; ++row) {
    for (int col = 0; col < x.window.cols; ++col) {
      sum.add(unpacked<T>(load_chunk(x.token(row, col) + c, size, vector)));
    }
  }
  Chunk<T> mean = sum.total();
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
      store_chunk(z + k, normalised<T>(args, chunk, rstd, -mean[0] * rstd, k, size, vector), size,
                  vector);
    });
    if (args.residual == nullptr) continue;
    T* residual = static_cast<T*>(args.residual) + index * channels;
    for_chunks<T>(1, channels, [&](int64_t, int64_t c, int size) {
      store_chunk(residual + c, mean_of_tokens(x, c, size, vector), size, vector);
    });
  }
}

// Four numbers per warp in shared memory: see Moments, and block_sum.
template <class T, class... Parameters, class... Arguments>
const char* launch_loop(void (*kernel)(Parameters...), const UnshuffleNorm& args, int threads,
                        void* stream, Arguments... arguments) {
  const size_t shared = 4 * size_t(threads / kWarp) * sizeof(AccumulateT<T>);
  const int64_t resident = resident_blocks(kernel, threads, shared);
  const int64_t blocks = args.views.window_rows < resident ? args.views.window_rows : resident;
  return launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, stream, args,
                arguments...);
}

}  // namespace

namespace cuda {

const char* unshuffle_norm_forward(const UnshuffleNorm& args, void* stream) {
  return with_width(
      args.dtype, args.channels,
      {{args.x, args.x_stride}, {args.norm_weight, 0}, {args.norm_bias, 0}},
      [&](auto element, auto width) {
        using T = decltype(element);
        constexpr bool kVector = width > 1;
        if constexpr (sizeof(T) <= 4) {
          const int64_t threads = threads_for_columns<T>(args.channels);
          if (args.views.window == 2 && threads <= Traits::kMaxThreads) {
            return launch_loop<T>(forward_2x2<T, kVector>, args, int(threads), stream);
          }
        }
        return launch_loop<T>(forward_any<T>, args, Traits::kLoopThreads, stream, kVector);
      });
}

}  // namespace cuda
}  // namespace uhd
