// SPDX-License-Identifier: Apache-2.0
// A sum of many terms that does not drift, on the CPU as on a GPU, in the same order. No torch
// here.
#pragma once
#include <cstdint>

#include "common/view_table.h"

namespace uhd {
namespace {  // a copy per instruction set: see vec.h

// Terms are added in blocks of 32, 32 blocks, and so on: one after the other, a million equal terms
// are off by a percent in float. No term meets more than 31 roundings a level, so that the sum of
// 32^n terms is off by less than 31 n half units in the last place of the sum of their magnitudes.
// Up to 32 terms are added one after the other. V{} is zero.
template <class V>
class BlockedSum {
 public:
  UHD_EVERYWHERE void add(const V& term) {
    terms_ += term;
    if (++count_ % 32 != 0) return;
    carry(blocks_, terms_);
    if (count_ % (1 << 10) != 0) return;
    carry(more_blocks_, blocks_);
    if (count_ % (1 << 15) == 0) carry(most_blocks_, more_blocks_);
  }
  UHD_EVERYWHERE V total() const {
    V sum = terms_;
    if (count_ < 32) return sum;
    sum += blocks_;
    sum += more_blocks_;
    sum += most_blocks_;
    return sum;
  }

 private:
  UHD_EVERYWHERE static void carry(V& to, V& from) {
    to += from;
    from = V{};
  }

  V terms_{}, blocks_{}, more_blocks_{}, most_blocks_{};
  uint32_t count_ = 0;
};

}  // namespace
}  // namespace uhd
