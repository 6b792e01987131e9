// SPDX-License-Identifier: Apache-2.0
// Stacks, and switching between them: what a simulated thread runs on.
//
// On x86-64 a switch is a dozen instructions; elsewhere, or with UHD_EMULATOR_UCONTEXT, it is
// swapcontext, which is correct everywhere and enters the kernel of the operating system each time.
// AddressSanitizer is told about every switch, so that its reports and C++ exceptions work.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>

#if !defined(__x86_64__) && !defined(UHD_EMULATOR_UCONTEXT)
#define UHD_EMULATOR_UCONTEXT
#endif
#ifdef UHD_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define UHD_EMULATOR_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define UHD_EMULATOR_ASAN
#endif
#endif
#ifdef UHD_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace uhd {
namespace emulator {

// A point to continue from, and the stack it lies on.
struct Context {
#ifdef UHD_EMULATOR_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  char* stack = nullptr;  // lowest address; found at the first switch for a host thread's own stack
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#ifndef UHD_EMULATOR_UCONTEXT
// Saves the callee-saved registers on this stack and its pointer in *save, then continues at `to`.
extern "C" __attribute__((visibility("hidden"))) void uhd_emulator_switch(void** save, void* to);
asm(R"(
  .pushsection .text.uhd_emulator_switch,"axG",@progbits,uhd_emulator_switch,comdat
  .weak uhd_emulator_switch
  .hidden uhd_emulator_switch
  .type uhd_emulator_switch,@function
uhd_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size uhd_emulator_switch, . - uhd_emulator_switch
  .popsection
)");
#endif

// Leaves `from`, continues `to`, and returns when something switches back to `from`; never, when
// for_good.
inline void switch_context(Context& from, Context& to, bool for_good = false) {
#ifdef UHD_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  (void)for_good;
#ifdef UHD_EMULATOR_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  uhd_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef UHD_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing on a fresh stack. Notes where the stack of `host` lies; the first fiber of a
// block comes from there.
inline void first_arrival(Context& host) {
#ifdef UHD_EMULATOR_ASAN
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (host.stack == nullptr) {
    host.stack = static_cast<char*>(const_cast<void*>(stack));
    host.stack_bytes = bytes;
  }
#else
  (void)host;
#endif
}

// Makes `context` start at `entry` on its stack, whatever ran there before.
inline void prepare(Context& context, void (*entry)()) {
#ifdef UHD_EMULATOR_ASAN
  __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
#ifdef UHD_EMULATOR_UCONTEXT
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = context.stack;
  context.registers.uc_stack.ss_size = context.stack_bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  void** top = reinterpret_cast<void**>(context.stack + context.stack_bytes);
  *--top = nullptr;  // where entry would return to; also aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
#endif
}

// Stacks with a guard page below each. They stay mapped from launch to launch.
class Stacks {
 public:
  static constexpr size_t kBytes = 128 << 10;  // large enough for unoptimised code under ASan

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(int count) {
    if (count <= count_) return;
    release();
    const size_t bytes = count * (guard_ + kBytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (int i = 0; i < count; ++i) {
      if (mprotect(stack(i) - guard_, guard_, PROT_NONE) != 0) fail("mprotect");
    }
  }
  char* stack(int i) const { return memory_ + i * (guard_ + kBytes) + guard_; }

 private:
  void release() {
    if (memory_ == nullptr) return;
#ifdef UHD_EMULATOR_ASAN
    // Frames that were left in the middle leave marks, and the next owner of the addresses is not
    // told: an allocator of its own, Python's say, would be accused of them.
    __asan_unpoison_memory_region(memory_, count_ * (guard_ + kBytes));
#endif
    munmap(memory_, count_ * (guard_ + kBytes));
    memory_ = nullptr;
    count_ = 0;
  }

  [[noreturn]] void fail(const char* function) {
    const std::error_code code(errno, std::generic_category());
    release();
    throw std::system_error(code, std::string("CUDA emulator: stacks of the threads: ") + function);
  }

  char* memory_ = nullptr;
  size_t guard_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  int count_ = 0;
};

}  // namespace emulator
}  // namespace uhd
