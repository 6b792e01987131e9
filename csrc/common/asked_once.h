// SPDX-License-Identifier: Apache-2.0
// Answers that do not change, for code of the host: what a launch asks the CUDA runtime takes as
// long as the launch. No CUDA here.
#pragma once
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace uhd {
namespace {

// Threads may ask at the same time; those that come while an answer is looked for wait for it.
template <class Key, class Answer>
class AskedOnce {
 public:
  // What ask() returned for the key when it was first asked; without an answer it is asked again.
  template <class Ask>
  std::optional<Answer> of(const Key& key, Ask&& ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(key);
    if (found != answers_.end()) return found->second;
    const std::optional<Answer> answer = ask();
    if (answer) answers_.emplace(key, *answer);
    return answer;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

}  // namespace
}  // namespace uhd
