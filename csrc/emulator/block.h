// SPDX-License-Identifier: Apache-2.0
// A running CUDA block: its threads, their barrier, and who runs next.
#pragma once
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/language.h"

namespace uhd {
namespace emulator {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffff;

// Where a kernel calls something: a default argument Site::here() names the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || !std::strcmp(file, other.file));
  }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Copy {  // cp.async
  void* shared;
  const void* global;
  int bytes;
  int group;
};

struct Block;
struct Warp;

enum class State : uint8_t { kRunnable, kWaiting, kExited };

struct Thread {
  Context context;
  State state;
  int lane;
  uint3 index;
  Block* block;
  Warp* warp;
  const char* waits_for;  // __syncthreads or a warp collective
  Site waits_at;
  std::vector<Copy> copies;  // not landed, oldest first
  int open_group;            // number of the group that cp.async adds to
};

// Lanes that come together to exchange values. Each leaves the address of its record, which lies on
// its own stack, and waits; the last to come completes the exchange for all.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* name = nullptr;
  void (*complete)(const Meeting&) = nullptr;
  const Thread* threads = nullptr;  // of the warp
  void* records[kWarpSize];

  template <class Record>
  Record& record(int lane) const {
    return *static_cast<Record*>(records[lane]);
  }
};

struct Warp {
  Thread* threads;
  uint32_t exited;  // lanes that returned from the kernel or never were
  std::vector<Meeting> meetings;

  // The meeting that lanes of this mask are gathering for, else an unused one. No pointer to it may
  // be kept across a switch.
  Meeting& meeting(uint32_t mask) {
    Meeting* unused = nullptr;
    for (Meeting& meeting : meetings) {
      if (meeting.arrived == 0) {
        unused = &meeting;
      } else if (meeting.mask == mask) {
        return meeting;
      }
    }
    return unused != nullptr ? *unused : meetings.emplace_back();
  }
};

struct Block {
  uint3 index;
  dim3 size, grid;
  int num_threads;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> order;  // in which threads get their turn
  size_t turn;                 // position in order
  bool greedy;                 // a warp keeps its turn for as long as one of its lanes can run
  char* shared;
  size_t shared_bytes;
  int at_barrier, exited;
  Site barrier;
  Context host;  // the stack that launch was called on
  void (*body)(const void*);
  const void* arguments;
  std::exception_ptr error;
};

inline thread_local Thread* current = nullptr;

inline std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

[[noreturn]] inline void fail(const Thread& thread, const std::string& what) {
  throw std::logic_error("CUDA emulator: " + what + " [block " + text(thread.block->index) +
                         ", thread " + text(thread.index) + "]");
}

// The thread that calls.
inline Thread& here() {
  if (current == nullptr) throw std::logic_error("CUDA emulator: device code outside of a kernel");
  return *current;
}

// Makes the next runnable thread the current one and returns where it continues; the host's context
// when there is none. In a fair order no warp is ever more than one collective ahead of another, so
// a value that is overwritten too early has long been read; a greedy one overwrites it.
inline Context& next_turn(Block& block) {
  if (block.greedy && current != nullptr) {
    const Warp& warp = *current->warp;
    for (int step = 1; step < kWarpSize; ++step) {
      const int lane = (current->lane + step) % kWarpSize;
      if (warp.exited >> lane & 1) continue;  // or there is no such lane
      if (warp.threads[lane].state == State::kRunnable) {
        current = &warp.threads[lane];
        return current->context;
      }
    }
  }
  const size_t count = block.order.size();
  for (size_t step = 0; step < count; ++step) {
    if (++block.turn >= count) block.turn = 0;
    Thread* thread = block.order[block.turn];
    if (thread->state == State::kRunnable) {
      current = thread;
      return thread->context;
    }
  }
  current = nullptr;
  return block.host;
}

// Lets others run until one of them makes this thread runnable again.
inline void wait(Thread& thread, const char* name, Site site) {
  thread.state = State::kWaiting;
  thread.waits_for = name;
  thread.waits_at = site;
  switch_context(thread.context, next_turn(*thread.block));
}

// Stricter than hardware, which forgives exited threads and barriers on different lines: the
// language demands that all threads of the block reach the same barrier.
inline void sync_threads(Site site) {
  Thread& me = here();
  Block& block = *me.block;
  if (block.exited > 0) {
    fail(me, "divergent barrier: __syncthreads at " + site.text() + ", but " +
                 std::to_string(block.exited) + " threads of the block have exited");
  }
  if (block.at_barrier == 0) block.barrier = site;
  if (!(block.barrier == site)) {
    fail(me, "divergent barrier: __syncthreads at " + site.text() + ", but " +
                 std::to_string(block.at_barrier) + " threads of the block wait at the one at " +
                 block.barrier.text());
  }
  if (++block.at_barrier < block.num_threads) return wait(me, "__syncthreads", site);
  block.at_barrier = 0;
  for (Thread& thread : block.threads) thread.state = State::kRunnable;
}

// What the language asks of a thread that returns from the kernel.
inline void check_exit(const Thread& me) {
  if (!me.copies.empty()) {
    fail(me, "exits with " + std::to_string(me.copies.size()) +
                 " cp.async copies that were never waited for");
  }
  if (me.block->at_barrier > 0) {
    fail(me, "divergent barrier: exits while " + std::to_string(me.block->at_barrier) +
                 " threads of the block wait in __syncthreads at " + me.block->barrier.text());
  }
  for (const Meeting& meeting : me.warp->meetings) {
    if (meeting.arrived != 0 && meeting.mask >> me.lane & 1) {
      fail(me, std::string("exits while lanes wait for it in ") + meeting.name);
    }
  }
}

// Runs the kernel as the current thread. Never returns: the stack ends here.
inline void thread_main() {
  Thread& me = *current;
  Block& block = *me.block;
  first_arrival(block.host);
  try {
    block.body(block.arguments);
    check_exit(me);
  } catch (...) {
    block.error = std::current_exception();
  }
  me.state = State::kExited;
  me.warp->exited |= 1u << me.lane;
  ++block.exited;
  if (block.error != nullptr) current = nullptr;
  switch_context(me.context, block.error != nullptr ? block.host : next_turn(block), true);
  std::abort();
}

[[noreturn]] inline void fail_deadlock(const Block& block) {
  std::map<std::string, int> waiting;
  const Thread* one = nullptr;
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kWaiting) continue;
    one = &thread;
    ++waiting[std::string(thread.waits_for) + " at " + thread.waits_at.text()];
  }
  std::string what = "deadlock:";
  for (const auto& [name, count] : waiting) {
    what += " " + std::to_string(count) + " threads wait in " + name + ",";
  }
  fail(*one, what + " " + std::to_string(block.exited) + " have exited");
}

// Runs all threads of a block whose fields other than the counters are set.
inline void run_block(Block& block) {
  block.at_barrier = block.exited = 0;
  block.error = nullptr;
  block.turn = block.order.size() - 1;
  for (Warp& warp : block.warps) {
    const int lanes = block.num_threads - static_cast<int>(warp.threads - block.threads.data());
    warp.exited = lanes >= kWarpSize ? 0 : kFullWarp << lanes;
    warp.meetings.clear();
  }
  for (Thread& thread : block.threads) {
    thread.state = State::kRunnable;
    thread.copies.clear();
    thread.open_group = 0;
    prepare(thread.context, thread_main);
  }
  switch_context(block.host, next_turn(block));
  if (block.error != nullptr) std::rethrow_exception(block.error);
  if (block.exited < block.num_threads) fail_deadlock(block);
}

}  // namespace emulator
}  // namespace uhd
