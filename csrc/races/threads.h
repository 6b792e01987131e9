// SPDX-License-Identifier: Apache-2.0
// Threads that share the work of a call, as those of torch do in the library.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace uhd {
namespace races {

inline int num_threads = 1;

// The function whose threads do all of the work each: a race, which must be reported.
inline const char* const planted = std::getenv("UHD_PLANTED_RACE");

// Runs work(thread, begin, end) over [0, total).
template <class Work>
void share(const char* function, int64_t total, Work&& work) {
  const bool all = planted != nullptr && std::strcmp(planted, function) == 0;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < num_threads; ++t) {
    const int64_t begin = all ? 0 : total * t / num_threads;
    const int64_t end = all ? total : total * (t + 1) / num_threads;
    if (begin < end) threads.emplace_back([&work, t, begin, end] { work(t, begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace races
}  // namespace uhd
