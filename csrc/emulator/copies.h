// SPDX-License-Identifier: Apache-2.0
// cp.async: copies from global to shared memory that land when they are waited for, not earlier.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#include "emulator/block.h"

namespace uhd {
namespace emulator {

// Throws unless 16 bytes at the address lie in the block's shared memory, aligned.
inline void check_shared_16(const Thread& thread, const char* name, const void* address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(thread.block->shared);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at < begin || at - begin > thread.block->shared_bytes ||
      thread.block->shared_bytes - (at - begin) < 16) {
    fail(thread, std::string(name) + ": the 16 bytes do not lie in the " +
                     std::to_string(thread.block->shared_bytes) +
                     " bytes of shared memory of this block");
  }
  if (at % 16 != 0) {
    fail(thread, std::string(name) + ": shared address is not 16-byte aligned (offset " +
                     std::to_string(at - begin) + ")");
  }
}

// Copies `bytes` bytes and fills up to 16 with zeros; with 0 bytes the source is not touched.
inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  Thread& me = here();
  check_shared_16(me, "cp.async", shared);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail(me, "cp.async: global address is not 16-byte aligned");
  }
  if (bytes < 0 || bytes > 16) {
    fail(me, "cp.async: must copy 0 to 16 bytes, got " + std::to_string(bytes));
  }
  // In flight the target is neither old nor new: a reader that came too early, or should have
  // finished, sees NaN.
  std::memset(shared, 0xff, 16);
  me.copies.push_back({shared, global, bytes, me.open_group});
}

inline void cp_async_commit() { ++here().open_group; }

// Lands all committed groups but the latest kLeft.
template <int kLeft>
void cp_async_wait() {
  Thread& me = here();
  size_t landed = 0;
  for (; landed < me.copies.size(); ++landed) {
    const Copy& copy = me.copies[landed];
    if (copy.group >= me.open_group - kLeft) break;
    std::memset(copy.shared, 0, 16);
    if (copy.bytes > 0) std::memcpy(copy.shared, copy.global, copy.bytes);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + landed);
}

}  // namespace emulator
}  // namespace uhd
