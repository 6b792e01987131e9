// SPDX-License-Identifier: Apache-2.0
// Launches a kernel: runs every block of the grid, on one or more host threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulator/block.h"

namespace uhd {
namespace emulator {

enum class Order { kAscending, kDescending, kRandom };

struct Options {
  Order order = Order::kAscending;
  uint64_t seed = 0;
  bool greedy = false;
  int host_threads = 1;
};

// The number that the text stands for after its first `skip` characters; `expected` words it for
// the one who set the variable.
inline uint64_t parse_option(const char* name, const char* text, size_t skip, uint64_t least,
                             uint64_t most, const char* expected) {
  char* end = nullptr;
  const char* digits = text + skip;
  const uint64_t number = std::strtoull(digits, &end, 10);
  if (digits[0] < '0' || digits[0] > '9' || *end != '\0' || number < least || number > most) {
    throw std::logic_error(std::string(name) + " must be " + expected + ", got \"" + text + "\"");
  }
  return number;
}

inline Options options_from_environment() {
  Options options;
  const char* order = std::getenv("UHD_EMULATOR_ORDER");
  if (order != nullptr && *order && std::strcmp(order, "ascending")) {
    const bool alone = !std::strcmp(order, "greedy");
    options.greedy = alone || !std::strncmp(order, "greedy-", 7);
    const size_t skip = options.greedy ? 7 : 0;
    if (!alone && !std::strcmp(order + skip, "descending")) {
      options.order = Order::kDescending;
    } else if (!alone) {
      options.order = Order::kRandom;
      options.seed = parse_option("UHD_EMULATOR_ORDER", order, skip, 0, INT64_MAX,
                                  "ascending, descending, the seed of a random order, greedy, or "
                                  "greedy-descending or greedy-<seed>");
    }
  }
  const char* threads = std::getenv("UHD_EMULATOR_THREADS");
  if (threads != nullptr && *threads) {
    options.host_threads = static_cast<int>(
        parse_option("UHD_EMULATOR_THREADS", threads, 0, 1, 64, "from 1 to 64 host threads"));
  }
  return options;
}

// Bytes of shared memory that kernels believe a block may have.
inline size_t shared_memory_limit() {
  const char* kilobytes = std::getenv("UHD_EMULATOR_SHARED_KB");
  if (kilobytes == nullptr || !*kilobytes) return 163 * 1024;
  return 1024 * parse_option("UHD_EMULATOR_SHARED_KB", kilobytes, 0, 48, 227,
                             "from 48 to 227 KB of shared memory");
}

constexpr int64_t kMaxBlocks = int64_t{1} << 31;  // so that products of two block numbers fit

// One call of launch, shared by its host threads.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void*);
  const void* arguments;
  Options options;
  int64_t num_blocks = 0;
  uint64_t stride = 1, offset = 0;  // block k of the run is k * stride + offset (mod num_blocks)
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

// The limits of compute capability 8.0 to 9.0.
inline void check_limits(const Launch& launch) {
  const auto refuse = [](const std::string& what, const std::string& limit) {
    throw std::logic_error("CUDA emulator: launch with " + what + ", must be " + limit);
  };
  const auto dim_text = [](dim3 d) { return text(uint3{d.x, d.y, d.z}); };
  const dim3 grid = launch.grid, block = launch.block;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 2147483647 || grid.y > 65535 ||
      grid.z > 65535) {
    refuse("grid " + dim_text(grid), "from (1, 1, 1) to (2^31 - 1, 65535, 65535)");
  }
  if (block.x < 1 || block.y < 1 || block.z < 1 || block.x > 1024 || block.y > 1024 ||
      block.z > 64 || block.x * block.y * block.z > 1024) {
    refuse("block " + dim_text(block), "from (1, 1, 1) to (1024, 1024, 64), at most 1024 threads");
  }
  if (launch.shared_bytes > 227 * 1024) {
    refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory", "at most 227 KB");
  }
}

struct FreeShared {
  void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{128}); }
};
// Exactly as long as asked for, so that AddressSanitizer sees an overrun.
using SharedMemory = std::unique_ptr<char, FreeShared>;
inline SharedMemory allocate_shared(size_t bytes) {
  return SharedMemory(static_cast<char*>(::operator new(bytes, std::align_val_t{128})));
}

// The threads and stacks of one host thread, kept from launch to launch.
class Worker {
 public:
  // Takes blocks until there are none left or one of them fails.
  void work(Launch& launch) {
    const SharedMemory shared = allocate_shared(launch.shared_bytes);
    set_up(launch);
    block_.shared = shared.get();
    for (int64_t k; !launch.failed && (k = launch.next++) < launch.num_blocks;) {
      const uint64_t number = (k * launch.stride + launch.offset) % launch.num_blocks;
      const unsigned plane = static_cast<unsigned>(number / launch.grid.x);
      block_.index = {static_cast<unsigned>(number % launch.grid.x), plane % launch.grid.y,
                      plane / launch.grid.y};
      if (launch.options.order == Order::kRandom) shuffle_threads(launch.options.seed, number);
      if (launch.shared_bytes > 0) std::memset(shared.get(), 0xff, launch.shared_bytes);  // NaN
      run_block(block_);
    }
  }

 private:
  void set_up(const Launch& launch) {
    const dim3 size = launch.block;
    const int count = static_cast<int>(size.x * size.y * size.z);
    stacks_.reserve(count);
    block_.size = size;
    block_.grid = launch.grid;
    block_.num_threads = count;
    block_.shared_bytes = launch.shared_bytes;
    block_.body = launch.body;
    block_.arguments = launch.arguments;
    block_.host = Context();
    block_.threads.resize(count);
    block_.warps.resize((count + kWarpSize - 1) / kWarpSize);
    block_.order.resize(count);
    block_.greedy = launch.options.greedy;
    for (int i = 0; i < count; ++i) {
      const unsigned u = static_cast<unsigned>(i);
      Thread& thread = block_.threads[i];
      thread.context.stack = stacks_.stack(i);
      thread.context.stack_bytes = Stacks::kBytes;
      thread.lane = i % kWarpSize;
      thread.index = {u % size.x, u / size.x % size.y, u / size.x / size.y};
      thread.block = &block_;
      thread.warp = &block_.warps[i / kWarpSize];
      if (thread.lane == 0) thread.warp->threads = &thread;
      block_.order[launch.options.order == Order::kDescending ? count - 1 - i : i] = &thread;
    }
  }

  // A new order for every block, the same one whichever host thread takes it.
  void shuffle_threads(uint64_t seed, uint64_t block_number) {
    std::sort(block_.order.begin(), block_.order.end());
    std::mt19937_64 random(seed * 0x9e3779b97f4a7c15 + block_number);
    std::shuffle(block_.order.begin(), block_.order.end(), random);
  }

  Stacks stacks_;
  Block block_;
};

inline void work(Launch& launch) {
  static thread_local Worker worker;
  try {
    worker.work(launch);
  } catch (...) {
    if (!launch.failed.exchange(true)) launch.error = std::current_exception();
  }
}

// Every order visits each block once: the stride has no common factor with the number of blocks.
inline void order_blocks(Launch& launch) {
  const uint64_t count = launch.num_blocks;
  if (launch.options.order == Order::kDescending) {
    launch.stride = launch.offset = count - 1;
  } else if (launch.options.order == Order::kRandom) {
    std::mt19937_64 random(launch.options.seed);
    do {
      launch.stride = random() % kMaxBlocks + 1;
    } while (std::gcd(launch.stride, count) != 1);
    launch.offset = random() % count;
  }
}

inline void run(Launch& launch) {
  if (current != nullptr) fail(*current, "launch inside of a kernel");
  check_limits(launch);
  launch.options = options_from_environment();
  launch.num_blocks = static_cast<int64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (launch.num_blocks > kMaxBlocks) {
    throw std::logic_error("CUDA emulator: more than 2^31 blocks would take hours");
  }
  order_blocks(launch);
  std::vector<std::thread> others;
  const int64_t host_threads = std::min<int64_t>(launch.options.host_threads, launch.num_blocks);
  try {
    for (int64_t i = 1; i < host_threads; ++i) others.emplace_back([&] { work(launch); });
  } catch (const std::system_error&) {
    // The operating system gives no more threads: those that there are do all the work.
  }
  work(launch);
  for (std::thread& other : others) other.join();
  if (launch.error != nullptr) std::rethrow_exception(launch.error);
}

// kernel<<<grid, block, shared_bytes>>>(args...), done when it returns. Throws std::logic_error for
// what the device would punish, and whatever the kernel throws.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "the driver copies parameters as bytes");
  static_assert((size_t{0} + ... + sizeof(P)) <= 4096, "parameters must fit in 4 KB");
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(args...)};
  Launch launch;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = shared_bytes;
  launch.body = [](const void* erased) {
    const Call& typed = *static_cast<const Call*>(erased);
    std::apply(typed.kernel, typed.arguments);
  };
  launch.arguments = &call;
  run(launch);
}

}  // namespace emulator
}  // namespace uhd
