// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone owns these ops; the CUDA library links the same glue

namespace uhd {
namespace {

#ifdef UHD_EMULATED
constexpr const char* kNames[] = {"emulated"};  // in the place of kScalar, the only one there is

Isa best_isa() { return Isa::kScalar; }
#else
constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
#else
  return Isa::kScalar;
#endif
}
#endif

Isa parse(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "CPU instruction set must be scalar, avx2 or avx512, and not above ",
                  kNames[static_cast<int>(best_isa())], " on this processor; got ", name);
}

Isa initial_isa() {
  const char* wish = std::getenv("UHD_OPS_CPU_ISA");
  return wish && *wish ? parse(wish) : best_isa();
}

std::atomic<Isa>& state() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

std::string best_cpu_isa() { return kNames[static_cast<int>(best_isa())]; }

std::string cpu_isa() { return kNames[static_cast<int>(active_isa())]; }

void set_cpu_isa(std::string name) { state().store(parse(name), std::memory_order_relaxed); }

}  // namespace

Isa active_isa() { return state().load(std::memory_order_relaxed); }

}  // namespace uhd

STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("_best_cpu_isa() -> str");
  m.def("_cpu_isa() -> str");
  m.def("_set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, CompositeExplicitAutograd, m) {
  m.impl("_best_cpu_isa", TORCH_BOX(&uhd::best_cpu_isa));
  m.impl("_cpu_isa", TORCH_BOX(&uhd::cpu_isa));
  m.impl("_set_cpu_isa", TORCH_BOX(&uhd::set_cpu_isa));
}

#endif
