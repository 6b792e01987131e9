// SPDX-License-Identifier: Apache-2.0
// Exercises csrc/emulator/cuda.h; test_emulator.py compiles and runs it, with emulator_layouts.cpp.
//
//   emulator_check reduce             two block reductions, right and without a barrier
//   emulator_check reuse              shared memory that is used again, right and without a barrier
//   emulator_check orders             in which order blocks and threads run
//   emulator_check turns              in which order warps run that pass three collectives each
//   emulator_check collectives        shuffles and votes against the formulas of the PTX ISA
//   emulator_check copies             cp.async before and after it was waited for
//   emulator_check poison             what shared memory holds when a block starts
//   emulator_check faults             each misuse, its message, and whether the next launch works
//   emulator_check concurrent         launches from two host threads at once
//   emulator_check asked_once         how often four threads ask two questions, and one in vain
//   emulator_check overrun WHERE N    stores, N places past the end (for AddressSanitizer)
//   emulator_check layouts|products|words|...   see emulator_layouts.cpp
#include <atomic>
#include <cstdio>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/asked_once.h"
#include "emulator/cuda.h"

int layouts_main(int argc, char** argv);

namespace {

using uhd::emulator::launch;

float* shared_floats() { return static_cast<float*>(uhd::emulator::dynamic_shared()); }

// out[block] = sum of the block's elements of x.
template <bool kWithBarrier>
__global__ void __launch_bounds__(256) sum_blocks(const float* x, float* out, int n) {
  float* partial = shared_floats();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  float value = i < n ? x[i] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if (kWithBarrier) __syncthreads();
  if (threadIdx.x >= 32) return;
  value = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

// Sums 7 blocks of 256 small integers, which is exact; the last block is not full.
bool reduces(void (*kernel)(const float*, float*, int)) {
  std::vector<float> x(7 * 256 - 100), out(7, -1.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31);
  launch(kernel, 7, 256, 8 * sizeof(float), x.data(), out.data(), static_cast<int>(x.size()));
  for (size_t block = 0; block < out.size(); ++block) {
    const auto first = x.begin() + 256 * block;
    const auto last = block == 6 ? x.end() : first + 256;
    if (!(std::accumulate(first, last, 0.0f) == out[block])) return false;
  }
  return true;
}

int check_reduce() {
  std::printf("%d %d\n", reduces(sum_blocks<true>), reduces(sum_blocks<false>));
  return 0;
}

// In three rounds each warp tells the others a number, in one and the same place. Counts the
// numbers that were not seen: after collectives of its own, a warp may write before others read.
template <bool kWithBarrier>
__global__ void tell_others(int* missed) {
  int* told = static_cast<int*>(uhd::emulator::dynamic_shared());
  const int warp = static_cast<int>(threadIdx.x / 32), warps = static_cast<int>(blockDim.x / 32);
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x % 32 == 0) told[warp] = round;
    __syncthreads();
    for (int other = 0; other < warps; ++other) *missed += told[other] != round;
    for (int i = 0; i < 2; ++i) __syncwarp();
    if (kWithBarrier) __syncthreads();
  }
}

int check_reuse() {
  int missed[2] = {};
  launch(tell_others<true>, 1, 128, 4 * sizeof(int), missed);
  launch(tell_others<false>, 1, 128, 4 * sizeof(int), missed + 1);
  std::printf("%d %d\n", missed[0] == 0, missed[1] == 0);
  return 0;
}

int print_turns() {
  std::vector<int> visited;
  launch(
      +[](std::vector<int>* list) {
        for (int round = 0; round < 3; ++round) {
          if (threadIdx.x % 32 == 16) list->push_back(10 * (threadIdx.x / 32) + round);
          __syncwarp();
        }
      },
      1, 96, 0, &visited);
  for (int entry : visited) std::printf("%d ", entry);
  return 0;
}

int print_orders() {
  std::vector<int> visited;
  launch(
      +[](std::vector<int>* list) { list->push_back(100 * blockIdx.x + threadIdx.x); }, 5, 8, 0,
      &visited);
  for (int entry : visited) std::printf("%d ", entry);
  return 0;
}

// One line per thread: what it got from each of the collectives.
__global__ void use_collectives(long long* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t mine = lane < 16 ? 0x0000ffff : 0xffff0000;
  long long* row = out + 10 * lane;
  *row++ = __shfl_sync(0xffffffff, lane, lane * 7 + 3);
  *row++ = __shfl_sync(0xffffffff, lane, 5, 8);
  *row++ = __shfl_up_sync(0xffffffff, lane, 3, 16);
  *row++ = __shfl_down_sync(0xffffffff, lane, 3, 16);
  *row++ = __shfl_xor_sync(0xffffffff, lane, 9, 8);
  *row++ = __shfl_xor_sync(mine, (1LL << 40) + lane, 5);
  *row++ = static_cast<long long>(__shfl_down_sync(mine, lane + 0.5, 2, 16) * 2);
  *row++ = __ballot_sync(mine, lane % 3 == 0);
  *row++ = __any_sync(mine, lane == 20);
  __syncwarp();
  *row++ = __all_sync(mine, lane != 20);
}

int print_collectives() {
  std::vector<long long> out(320);
  launch(use_collectives, 1, 32, 0, out.data());
  for (long long value : out) std::printf("%lld ", value);
  return 0;
}

// Reads each of two groups of copies at three moments: in flight, one group landed, both landed;
// and a copy that is cut off after 4 bytes.
__global__ void read_copies(const float* x, float* out) {
  float* stage = shared_floats();
  for (int i = 0; i < 12; ++i) stage[i] = -1.0f;
  uhd::emulator::cp_async_16(stage, x);
  uhd::emulator::cp_async_commit();
  uhd::emulator::cp_async_16(stage + 4, x + 4);
  uhd::emulator::cp_async_16(stage + 8, x + 8, 4);
  uhd::emulator::cp_async_commit();
  for (int i = 0; i < 12; ++i) *out++ = stage[i];
  uhd::emulator::cp_async_wait<1>();
  for (int i = 0; i < 12; ++i) *out++ = stage[i];
  uhd::emulator::cp_async_wait<0>();
  for (int i = 0; i < 12; ++i) *out++ = stage[i];
}

int print_copies() {
  alignas(16) float x[12];
  float out[36];
  std::iota(x, x + 12, 1.0f);
  launch(read_copies, 1, 1, 48, static_cast<const float*>(x), static_cast<float*>(out));
  for (float value : out) std::printf("%g ", value);
  return 0;
}

// What each block finds in its shared memory before it writes there: how many NaN.
int print_poison() {
  int found[3] = {};
  launch(
      +[](int* out) {
        for (int i = 0; i < 64; ++i) {
          out[blockIdx.x] += std::isnan(shared_floats()[i]);
          shared_floats()[i] = 0.0f;
        }
      },
      3, 1, 256, static_cast<int*>(found));
  std::printf("%d %d %d\n", found[0], found[1], found[2]);
  return 0;
}

struct Fault {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  void (*kernel)(float*);
};

void do_nothing(float*) {}
int thread() { return static_cast<int>(threadIdx.x); }

const Fault kFaults[] = {
    {"barrier_of_some", 1, 64, 0, [](float*) { thread() < 32 ? __syncthreads() : void(); }},
    {"barriers_on_two_lines", 1, 64, 0,
     [](float*) {
       if (thread() < 32) {
         __syncthreads();
       } else {
         __syncthreads();
       }
     }},
    {"deadlock", dim3(1, 1, 2), 64, 0,
     [](float*) { thread() % 2 == 0 ? __syncthreads() : __syncwarp(); }},
    {"different_collectives", 1, 32, 0,
     [](float*) { thread() < 16 ? __syncwarp() : void(__ballot_sync(0xffffffff, 1)); }},
    {"different_masks", 1, 32, 0,
     [](float*) { thread() < 16 ? __syncwarp() : __syncwarp(0xffff0001); }},
    {"mask_misses_caller", 1, 32, 0, [](float*) { __shfl_sync(0x0000ffff, 1, 0); }},
    {"mask_names_exited", 1, 32, 0,
     [](float*) {
       if (thread() != 9) __syncwarp();
     }},
    {"mask_names_nobody", 1, 48, 0, [](float*) { __shfl_xor_sync(0xffffffff, 1.0f, 1); }},
    {"shuffle_outside_mask", 1, 32, 0,
     [](float*) { __shfl_xor_sync(thread() < 16 ? 0x0000ffff : 0xffff0000, 1, 16); }},
    {"shuffle_width", 1, 32, 0, [](float*) { __shfl_sync(0xffffffff, 1, 0, 12); }},
    {"byte_perm", 1, 1, 0, [](float*) { __byte_perm(1, 2, 0x3218); }},
    {"grid_x_zero", 0, 32, 0, do_nothing},
    {"grid_x", 2147483648u, 32, 0, do_nothing},
    {"grid_y", dim3(1, 65536), 32, 0, do_nothing},
    {"grid_z", dim3(1, 1, 65536), 32, 0, do_nothing},
    {"block_zero", 1, dim3(32, 0), 0, do_nothing},
    {"block_size", 1, dim3(32, 33), 0, do_nothing},
    {"block_z", 1, dim3(1, 1, 65), 0, do_nothing},
    {"shared_limit", 1, 32, 227 * 1024 + 1, do_nothing},
    {"copy_shared_misaligned", 1, 1, 64,
     [](float* x) { uhd::emulator::cp_async_16(shared_floats() + 1, x); }},
    {"copy_global_misaligned", 1, 1, 64,
     [](float* x) { uhd::emulator::cp_async_16(shared_floats(), x + 1); }},
    {"copy_past_shared", 1, 1, 56,
     [](float* x) { uhd::emulator::cp_async_16(shared_floats() + 12, x); }},
    {"copy_before_shared", 1, 1, 56,
     [](float* x) { uhd::emulator::cp_async_16(shared_floats() - 4, x); }},
    {"copy_into_global", 1, 1, 64, [](float* x) { uhd::emulator::cp_async_16(x, x); }},
    {"copy_17_bytes", 1, 1, 64,
     [](float* x) { uhd::emulator::cp_async_16(shared_floats(), x, 17); }},
    {"copy_uncommitted", 1, 1, 64,
     [](float* x) {
       uhd::emulator::cp_async_16(shared_floats(), x);
       uhd::emulator::cp_async_wait<0>();
     }},
    {"copy_unwaited", 1, 1, 64,
     [](float* x) {
       uhd::emulator::cp_async_16(shared_floats(), x);
       uhd::emulator::cp_async_commit();
       uhd::emulator::cp_async_wait<1>();
     }},
    {"matrix_misaligned", 1, 32, 1024,
     [](float*) {
       uint32_t registers[4];
       uhd::emulator::ldmatrix(registers, 4, shared_floats() + 4 * thread() + (thread() == 31),
                               false);
     }},
    {"matrix_past_shared", 1, 32, 504,
     [](float*) {
       uint32_t registers[4];
       uhd::emulator::ldmatrix(registers, 4, shared_floats() + 4 * thread(), true);
     }},
    {"matrix_of_some", 1, 32, 512,
     [](float*) {
       uint32_t registers[4];
       if (thread() < 8) uhd::emulator::ldmatrix(registers, 1, shared_floats(), false);
     }},
    {"matrix_three", 1, 32, 512,
     [](float*) {
       uint32_t registers[4];
       uhd::emulator::ldmatrix(registers, 3, shared_floats(), false);
     }},
    {"nested_launch", 1, 1, 0, [](float* x) { launch(do_nothing, 1, 1, 0, x); }},
    {"thrown_by_kernel", 3, 64, 0,
     [](float*) {
       if (thread() == 40) throw std::runtime_error("thrown by a kernel");
       __syncwarp();
       __syncthreads();
     }},
};

int print_faults() {
  alignas(16) float x[8] = {};
  for (const Fault& fault : kFaults) {
    std::string message = "nothing was thrown";
    try {
      launch(fault.kernel, fault.grid, fault.block, fault.shared_bytes, static_cast<float*>(x));
    } catch (const std::logic_error& error) {
      message = error.what();
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    const bool usable = reduces(sum_blocks<true>);
    std::printf("%s\t%s\t%s\n", fault.name, message.c_str(), usable ? "usable" : "broken");
  }
  try {
    std::printf("threadIdx is %u outside of a kernel\n", threadIdx.x);
  } catch (const std::logic_error& error) {
    std::printf("outside_of_kernel\t%s\tusable\n", error.what());
  }
  return 0;
}

int check_concurrent() {
  bool right[2] = {true, true};
  const auto work = [&](int host) {
    for (int i = 0; i < 50; ++i) right[host] = right[host] && reduces(sum_blocks<true>);
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  std::printf("%d %d\n", right[0], right[1]);
  return 0;
}

__global__ void store_global(float* x, int at) { x[at + threadIdx.x] = 1.0f; }
__global__ void store_shared(float*, int at) { shared_floats()[at + threadIdx.x] = 1.0f; }

// 32 threads store to an array of 32, beginning at element `past`.
int overrun(const std::string& where, int past) {
  std::vector<float> x(32);
  const auto kernel = where == "global" ? store_global : store_shared;
  launch(kernel, 1, 32, 32 * sizeof(float), x.data(), past);
  std::printf("unnoticed\n");
  return 0;
}

// Each of four threads asks each question 100 times; the third has no answer.
int print_asked_once() {
  uhd::AskedOnce<int, int> asked;
  std::atomic<int> count[3] = {}, wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 300; ++i) {
        const int key = i % 3;
        const auto ask = [&]() -> std::optional<int> {
          const int before = count[key]++;
          std::this_thread::yield();
          return key == 2 ? std::nullopt : std::optional<int>(10 * key + before);
        };
        if (asked.of(key, ask).value_or(-1) != (key == 2 ? -1 : 10 * key)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("%d %d %d %d\n", count[0].load(), count[1].load(), count[2].load(), wrong.load());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  try {
    if (command == "reduce") return check_reduce();
    if (command == "reuse") return check_reuse();
    if (command == "orders") return print_orders();
    if (command == "turns") return print_turns();
    if (command == "collectives") return print_collectives();
    if (command == "copies") return print_copies();
    if (command == "poison") return print_poison();
    if (command == "faults") return print_faults();
    if (command == "concurrent") return check_concurrent();
    if (command == "asked_once") return print_asked_once();
    if (command == "overrun" && argc == 4) return overrun(argv[2], std::atoi(argv[3]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return layouts_main(argc, argv);
}
