// SPDX-License-Identifier: Apache-2.0
// What uhd_ops/_host.py calls in libuhd_host.so: plain C functions, without torch, and without
// Python's headers, so that one library serves every version of Python.
#include <cstdint>
#include <exception>
#include <string>

#include "host/slice_planner.h"

#define UHD_EXPORT extern "C" __attribute__((visibility("default")))

// Writes one plan for each of `count` images; `sides` holds all widths, then all heights. Returns
// null, or the text of an error, which lasts until the next call of the same thread.
UHD_EXPORT const char* uhd_plan_slices(const int64_t* sides, int64_t count,
                                       const uhd::SliceOptions* options, uhd::SlicePlan* plans) {
  thread_local std::string error;
  try {
    uhd::check_options(*options);
    for (int64_t i = 0; i < count; ++i) {
      plans[i] = uhd::plan_slices(sides[i], sides[count + i], *options);
    }
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
  return nullptr;
}

// What the build was configured with: lines of a name, a tab and its value.
UHD_EXPORT const char* uhd_build_info() {
  return "version\t" UHD_VERSION
         "\n"
         "compiler\t" UHD_CXX
         "\n"
         "cpu_isas\t" UHD_ISAS
         "\n"
         "cuda_archs\t" UHD_CUDA_ARCHS
         "\n"
         "torch_target\t" UHD_TORCH_TARGET;
}
