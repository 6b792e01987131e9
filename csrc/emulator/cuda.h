// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, for tests: what a .cu file includes instead of cuda_runtime.h when
// g++ compiles it (-std=c++17 -x c++ -Wno-unknown-pragmas -DUHD_EMULATED -I csrc).
//
// Every CUDA thread is a fiber of its own. A fiber runs until it waits at a barrier or in a warp
// collective, then the next one gets its turn. Shared memory is full of NaN when a block starts,
// and an asynchronous copy lands when it is waited for, not earlier.
//
// What a passing test proves: indices, masks, fragment layouts, reductions, the placement of
// barriers that some order of threads needs, and (with -fsanitize=address) that every access stays
// inside its array. Whatever hardware would answer with a hang, an illegal address or garbage is a
// std::logic_error that says what happened and where. Run it in several orders:
//
//   UHD_EMULATOR_ORDER    ascending (default), descending, or a number: the seed of a random order
//                         of blocks and of the threads within each block. These are fair: each
//                         thread gets its turn. greedy, greedy-descending and greedy-<seed> let the
//                         warp that runs go on for as long as it can, past collectives that others
//                         have not reached, until it waits in __syncthreads.
//   UHD_EMULATOR_SHARED_KB  shared memory of a block: 163 (default), as compute capability 8.0 has,
//                           99 as 8.6, 8.9 and 12.0
//   UHD_EMULATOR_THREADS  host threads that share the blocks of a grid (default 1)
//
// What it cannot prove: that no barrier is missing (fibers switch at barriers and collectives only,
// so two threads never run at once), memory ordering, bank conflicts, coalescing, register counts,
// timing, and the last bit of mma.sync or of the fast math functions. Those need a device and
// compute-sanitizer. A thread that spins until another one writes to memory never ends here.
#pragma once
#include <cstdint>

#include "emulator/block.h"
#include "emulator/collectives.h"
#include "emulator/copies.h"
#include "emulator/halves.h"
#include "emulator/language.h"
#include "emulator/launch.h"
#include "emulator/tensor_core.h"

// libstdc++ spells an attribute like this keyword: include the standard headers first.
#define __noinline__ __attribute__((noinline))

#define threadIdx (::uhd::emulator::here().index)
#define blockIdx (::uhd::emulator::here().block->index)
#define blockDim (::uhd::emulator::here().block->size)
#define gridDim (::uhd::emulator::here().block->grid)

namespace uhd {
namespace emulator {

// The start of the block's shared memory, aligned to 128 bytes.
inline void* dynamic_shared() { return here().block->shared; }

}  // namespace emulator
}  // namespace uhd

inline void __syncthreads(uhd::emulator::Site site = uhd::emulator::Site::here()) {
  uhd::emulator::sync_threads(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       uhd::emulator::Site site = uhd::emulator::Site::here()) {
  uhd::emulator::Nothing nothing;
  uhd::emulator::meet("__syncwarp", mask, nothing, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::shuffle("__shfl_sync", uhd::emulator::ShuffleMode::kIndex, mask, value,
                                static_cast<unsigned>(lane), width, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::shuffle("__shfl_up_sync", uhd::emulator::ShuffleMode::kUp, mask, value,
                                delta, width, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::shuffle("__shfl_down_sync", uhd::emulator::ShuffleMode::kDown, mask, value,
                                delta, width, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::shuffle("__shfl_xor_sync", uhd::emulator::ShuffleMode::kXor, mask, value,
                                static_cast<unsigned>(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate,
                      uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      uhd::emulator::Site site = uhd::emulator::Site::here()) {
  return uhd::emulator::ballot("__all_sync", mask, predicate != 0, site) == mask;
}
