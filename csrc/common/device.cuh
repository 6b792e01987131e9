// SPDX-License-Identifier: Apache-2.0
// The CUDA language, real or emulated. Every *_cuda.cu file includes this, and nothing of CUDA
// itself.
//
// nvcc compiles kernels for a GPU. With UHD_EMULATED a C++ compiler builds the same files, and
// csrc/emulator runs them on the CPU: one fiber per CUDA thread.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef UHD_EMULATED
#include "emulator/cuda.h"
#define UHD_DEVICE inline
#define UHD_HOST_DEVICE inline
#define UHD_RESTRICT __restrict__
#else
#include <cuda_runtime.h>

#include <optional>
#include <tuple>
#include <utility>

#include "common/asked_once.h"
#define UHD_DEVICE __device__ __forceinline__
#define UHD_HOST_DEVICE __host__ __device__ __forceinline__
#define UHD_RESTRICT __restrict__
#endif

namespace uhd {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Bytes of shared memory that one block may ask for on the current device.
inline size_t shared_memory_limit() {
#ifdef UHD_EMULATED
  return emulator::shared_memory_limit();
#else
  int device = 0, bytes = 48 * 1024;  // what every device has
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return static_cast<size_t>(bytes);
#endif
}

#ifndef UHD_EMULATED
// For the most there is, not for what a launch needs: the limit belongs to the kernel, and another
// thread may be about to launch it with more.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  // Lives as long as the process: at its end another thread may still launch.
  static auto& asked = *new AskedOnce<std::pair<const void*, int>, bool>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  asked.of({kernel, device}, [&]() -> std::optional<bool> {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_memory_limit()));
    return error == cudaSuccess ? std::optional<bool>(true) : std::nullopt;
  });
  return error;
}
#endif

// Launches and returns nullptr, or the error's text. The parameters are copied by value. A kernel
// may have been given an empty grid, which a GPU refuses: then there is nothing to do.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
#ifdef UHD_EMULATED
  (void)stream;
  emulator::launch(kernel, grid, block, shared_bytes, arguments...);
  return nullptr;
#else
  if (shared_bytes > 48 * 1024) {  // more than a kernel gets unless it asks
    const cudaError_t error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next launch would report it again
      return cudaGetErrorString(error);
    }
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// The shared memory of the block, of the size given to launch(), 16-byte aligned. Kernels use no
// other: this one the emulator fills with NaN and guards.
template <class T>
UHD_DEVICE T* dynamic_shared() {
#ifdef UHD_EMULATED
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// Blocks that cover `total` pieces of work, `per_block` each. More than a grid can hold come out as
// a number that the launch refuses.
inline dim3 blocks_for(int64_t total, int64_t per_block) {
  const int64_t blocks = (total + per_block - 1) / per_block;
  return dim3(blocks < UINT32_MAX ? static_cast<unsigned>(blocks) : UINT32_MAX);
}

// Blocks of a kernel that the device holds at once: the grid of a kernel that loops over its work.
// The result must not depend on it.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared_bytes) {
#ifdef UHD_EMULATED
  (void)kernel, (void)threads, (void)shared_bytes;
  return 3;  // few, so that small tests loop
#else
  using Question = std::tuple<const void*, int, int, size_t>;
  static auto& asked = *new AskedOnce<Question, int64_t>;  // as above
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;  // where a query fails, so does the launch
  const Question question{reinterpret_cast<const void*>(kernel), device, threads, shared_bytes};
  const auto ask = [&]() -> std::optional<int64_t> {
    int processors = 0, blocks = 0;
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (processors * blocks <= 0) return std::nullopt;
    return int64_t(processors) * blocks;
  };
  return asked.of(question, ask).value_or(1);
#endif
}

// a * b, an offset of bytes. It takes one instruction, so it is computed where it is written: the
// compiler neither keeps it in registers from before a loop nor multiplies 64 bits by 64.
UHD_DEVICE int64_t wide_product(int a, int b) {
#ifdef UHD_EMULATED
  return int64_t(a) * b;
#else
  int64_t product;
  asm volatile("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#endif
}

// x, of which the compiler knows nothing any more: what is computed from it is computed where it is
// written, and takes no register from the last place or loop where the same was computed.
UHD_DEVICE int opaque(int x) {
#ifndef UHD_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The sum over the lanes of a warp, the same bits in each; the order of additions is fixed.
template <class S>
UHD_DEVICE S warp_sum(S value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

}  // namespace
}  // namespace uhd
