// SPDX-License-Identifier: Apache-2.0
// Runs every code path of the CUDA kernels without torch or Python: small enough for
// compute-sanitizer, and for the emulator's thread orders. As uhd_race_driver it runs the CPU
// kernels on eight threads instead, under ThreadSanitizer (.ci/races.sh).
//
// This is no second test suite: how exact a result must be is the question of the battery
// (docs/adr/0005-tolerances.md). Here one bound tells a right result from one with a wrong token,
// a missing term or a race. With u the unit roundoff, a result is reached by at most four roundings
// to its element type (probabilities, gradients of scores, an approximate function, the store), and
// by a sum of `terms` in the wide type with at most 64 operations around it. Each rounds a number
// that is no larger than about the largest result of its tensor, so an element may be off by
//   (4 u(element type) + (terms + 64) u(wide type)) * largest result.
// Every case runs several times, and must give the same bits: emulated, in every order of threads
// that .ci/emulate.sh is for; on the CPU, for every number of threads.
#include <cstdio>
#include <cstdlib>

#include "driver/side.h"
#ifdef UHD_RACES
#include "races/threads.h"
#endif

namespace {

using namespace uhd;          // NOLINT: a program
using namespace uhd::driver;  // NOLINT

constexpr const char* kUsage =
    "usage: uhd_cuda_driver [--bare] [NAME]\n"
    "  --bare  do not fill new memory with NaN: compute-sanitizer's initcheck then sees reads of "
    "it\n"
    "  NAME    only cases whose name or type contains it\n";

// What a case runs in, one after the other.
#if defined(UHD_RACES)
constexpr const char* kRuns[] = {"8", "1"};  // threads
void prepare(const char* threads) { races::num_threads = std::atoi(threads); }
#elif defined(UHD_EMULATED)
constexpr const char* kRuns[] = {"ascending", "descending",        "1",
                                 "greedy",    "greedy-descending", "greedy-1"};
void prepare(const char* order) { setenv("UHD_EMULATOR_ORDER", order, 1); }
#else
constexpr const char* kRuns[] = {"first", "second"};  // the device has orders of its own
void prepare(const char*) {}
#endif

// Half the distance from 1 to the next number.
double unit_roundoff(DType dtype) {
  return dtype == DType::kFloat64    ? 0x1p-53
         : dtype == DType::kFloat32  ? 0x1p-24
         : dtype == DType::kBFloat16 ? 0x1p-8
                                     : 0x1p-11;
}

std::vector<double> values_of(const Side::Output& output) {
  const std::vector<char> bytes = output.buffer.download();
  const size_t size = static_cast<size_t>(element_size(output.dtype));
  std::vector<double> values;
  for (size_t i = 0; i < bytes.size(); i += size) values.push_back(decode(output.dtype, &bytes[i]));
  return values;
}

// What is wrong with the results of the device, or nothing; `worst` is their error in bounds.
std::string check(const Case& one, double& worst) {
  Side host, first(one.dtype);
#ifndef UHD_RACES  // the battery knows how right the CPU kernels are
  one.run(host);
#endif
  prepare(kRuns[0]);
  one.run(first);
  const double relative = 4 * unit_roundoff(one.dtype) +
                          static_cast<double>(one.terms + 64) * unit_roundoff(wide(one.dtype));
  for (size_t k = 0; k < host.outputs().size(); ++k) {
    const Side::Output& output = first.outputs()[k];
    const std::vector<double> expected = values_of(host.outputs()[k]), found = values_of(output);
    double bound = 0;
    for (const double value : expected) bound = std::max(bound, relative * std::fabs(value));
    for (size_t i = 0; i < found.size(); ++i) {
      const double error = std::fabs(found[i] - expected[i]);
      if (!(error <= bound)) {
        return output.name + "[" + std::to_string(i) + "] is " + std::to_string(found[i]) +
               ", expected " + std::to_string(expected[i]) + " up to " + std::to_string(bound);
      }
      if (error > 0) worst = std::max(worst, error / bound);
    }
  }
  for (const char* run : kRuns) {
    if (run == kRuns[0]) continue;
    Side again(one.dtype);
    prepare(run);
    one.run(again);
    for (size_t k = 0; k < first.outputs().size(); ++k) {
      const Side::Output &output = again.outputs()[k], &before = first.outputs()[k];
      if (output.buffer.download() != before.buffer.download()) {
        return output.name + " has other bits in the run \"" + run + "\"";
      }
    }
  }
  return "";
}

}  // namespace

int main(int count, char** words) {
  std::string filter;
  for (int i = 1; i < count; ++i) {
    if (!std::strcmp(words[i], "--bare")) {
      poison = false;
    } else if (words[i][0] != '-' && filter.empty()) {
      filter = words[i];
    } else {
      std::fputs(kUsage, stderr);
      return 2;
    }
  }
  constexpr const char* kDTypes[] = {"float32", "float64", "bfloat16", "float16"};
  int done = 0, failed = 0;
  double worst = 0;
  for (const Case& one : all_cases()) {
    const std::string name = one.name + ", " + kDTypes[static_cast<int>(one.dtype)];
    if (name.find(filter) == std::string::npos) continue;
    ++done;
    try {
      const std::string wrong = check(one, worst);
      if (wrong.empty()) continue;
      ++failed;
      std::printf("FAILED %s: %s\n", name.c_str(), wrong.c_str());
    } catch (const std::exception& error) {
      // After an illegal access a GPU refuses everything, so there is nothing to go on with.
      std::printf("STOPPED at %s: %s\n", name.c_str(), error.what());
      return 1;
    }
  }
#ifdef UHD_RACES
  std::printf("%d of %d cases failed\n", failed, done);
#else
  std::printf("%d of %d cases failed, the largest error is %.2f of its bound\n", failed, done,
              worst);
#endif
  return failed == 0 && done > 0 ? 0 : 1;
}
