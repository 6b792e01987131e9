// SPDX-License-Identifier: Apache-2.0
// Checks the CUDA kernels without torch or Python: small enough for compute-sanitizer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "driver/checks.h"

namespace {

using uhd::driver::Report;

struct Operator {
  const char* name;
  void (*check)(Report& report, bool quick);
};

constexpr Operator kOperators[] = {
    {"linear_activation", uhd::driver::check_linear_activation},
    {"pixel_unshuffle", uhd::driver::check_pixel_unshuffle},
    {"tile_average", uhd::driver::check_tile_average},
    {"tile_block_diagonal", uhd::driver::check_tile_block_diagonal},
    {"tile_vector", uhd::driver::check_tile_vector},
    {"unshuffle_norm", uhd::driver::check_unshuffle_norm},
    {"window_attention", uhd::driver::check_window_attention},
    {"window_mean", uhd::driver::check_window_mean},
    {"window_pool", uhd::driver::check_window_pool},
};

constexpr const char* kUsage =
    "usage: uhd_cuda_driver [--quick] [--op NAME] [--repeat N] [--unguarded] [--list]\n"
    "  --quick      a small part of the cases, for compute-sanitizer\n"
    "  --op NAME    one operator only\n"
    "  --repeat N   run every case N times; all runs must give the same bits\n"
    "  --unguarded  no guard bands: compute-sanitizer then sees every access outside of a buffer\n"
    "  --list       the names of the operators\n";

struct Options {
  bool quick = false;
  const char* op = nullptr;
  int repeats = 1;
};

// Whether the checks should run; else the exit status is in `status`.
bool parse(int count, char** words, Options& options, int& status) {
  status = 2;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--quick") {
      options.quick = true;
    } else if (word == "--unguarded") {
      uhd::driver::Buffer::guard_bytes = 0;
    } else if (word == "--op" && i + 1 < count) {
      options.op = words[++i];
    } else if (word == "--repeat" && i + 1 < count) {
      options.repeats = std::atoi(words[++i]);
    } else if (word == "--list") {
      for (const Operator& op : kOperators) std::printf("%s\n", op.name);
      status = 0;
      return false;
    } else {
      std::fputs(kUsage, stderr);
      return false;
    }
  }
  bool known = options.op == nullptr;
  for (const Operator& op : kOperators) known = known || !std::strcmp(options.op, op.name);
  if (known && options.repeats >= 1) return true;
  std::fputs(known ? "--repeat must be a number from 1\n" : "no such operator: see --list\n",
             stderr);
  return false;
}

}  // namespace

int main(int count, char** words) {
  Options options;
  int status = 0;
  if (!parse(count, words, options, status)) return status;
  Report report(options.repeats);
  try {
    std::printf("on %s\n", uhd::driver::device_name().c_str());
    for (const Operator& op : kOperators) {
      if (options.op == nullptr || !std::strcmp(options.op, op.name)) {
        op.check(report, options.quick);
        report.end_group();
      }
    }
  } catch (const std::exception& error) {
    // After an illegal access a GPU refuses everything, so there is nothing to go on with.
    report.fail("stopped", error.what());
  }
  return report.finish();
}
