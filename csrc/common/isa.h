// SPDX-License-Identifier: Apache-2.0
// Picks the instruction set of the CPU kernels at run time.
//
// A kernel file <op>_cpu.cpp is compiled once per instruction set, each time with UHD_ISA set to
// the name of the namespace that its functions live in. Its header declares them with UHD_PER_ISA;
// the glue calls the variant that fits this processor with UHD_CALL_ISA.
#pragma once

namespace uhd {

enum class Isa { kScalar, kAvx2, kAvx512 };

// The best instruction set of this processor, or the one asked for with UHD_OPS_CPU_ISA or
// set_active_isa.
Isa active_isa();

}  // namespace uhd

#if defined(__x86_64__)
#define UHD_PER_ISA(...) \
  namespace scalar {     \
  __VA_ARGS__            \
  }                      \
  namespace avx2 {       \
  __VA_ARGS__            \
  }                      \
  namespace avx512 {     \
  __VA_ARGS__            \
  }
#define UHD_CALL_ISA(function, ...)                                           \
  (::uhd::active_isa() == ::uhd::Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::uhd::active_isa() == ::uhd::Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                              : scalar::function(__VA_ARGS__))
#else
#define UHD_PER_ISA(...) \
  namespace scalar {     \
  __VA_ARGS__            \
  }
#define UHD_CALL_ISA(function, ...) scalar::function(__VA_ARGS__)
#endif
