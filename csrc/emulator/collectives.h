// SPDX-License-Identifier: Apache-2.0
// Warp collectives: shuffles, votes and __syncwarp, after the formulas of PTX shfl.sync and
// vote.sync.
#pragma once
#include <cstdint>
#include <string>

#include "emulator/block.h"

namespace uhd {
namespace emulator {

inline void join(const char* name, uint32_t mask, void* record, void (*complete)(const Meeting&),
                 Site site) {
  Thread& me = here();
  Warp& warp = *me.warp;
  const auto where = [&] { return std::string(name) + " at " + site.text(); };
  if (!(mask >> me.lane & 1)) fail(me, where() + ": the mask misses the calling lane");
  if (mask & warp.exited) fail(me, where() + ": the mask names lanes that have exited");
  Meeting& meeting = warp.meeting(mask);
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.name = name;
    meeting.complete = complete;
    meeting.threads = warp.threads;
  } else if (meeting.complete != complete || std::strcmp(meeting.name, name) != 0) {
    fail(me, "lanes of a warp are in different collectives: " + where() + ", others in " +
                 meeting.name);
  }
  meeting.records[me.lane] = record;
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived != mask) return wait(me, name, site);
  meeting.arrived = 0;
  complete(meeting);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) warp.threads[lane].state = State::kRunnable;
  }
}

// Waits for all lanes of the mask. The last one calls Record::complete with everyone's record.
template <class Record>
void meet(const char* name, uint32_t mask, Record& record, Site site) {
  join(name, mask, &record, Record::complete, site);
}

struct Nothing {
  static void complete(const Meeting&) {}
};

template <class T>
struct Shuffle {
  T value, result;
  int source;

  static void complete(const Meeting& meeting) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(meeting.mask >> lane & 1)) continue;
      Shuffle& record = meeting.record<Shuffle>(lane);
      if (!(meeting.mask >> record.source & 1)) {
        fail(meeting.threads[lane], std::string(meeting.name) + " reads lane " +
                                        std::to_string(record.source) +
                                        ", which the mask does not name");
      }
      record.result = meeting.record<Shuffle>(record.source).value;
    }
  }
};

struct Ballot {
  bool predicate;
  uint32_t result;

  static void complete(const Meeting& meeting) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (meeting.mask >> lane & 1 && meeting.record<Ballot>(lane).predicate) votes |= 1u << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (meeting.mask >> lane & 1) meeting.record<Ballot>(lane).result = votes;
    }
  }
};

enum class ShuffleMode { kIndex, kUp, kDown, kXor };

// The lane that `lane` reads, by the formulas of PTX shfl.sync.
inline int shuffle_source(ShuffleMode mode, int lane, unsigned operand, int width) {
  const int segment = kWarpSize - width, b = static_cast<int>(operand & 31);
  const int first = lane & segment, last = first | (31 & ~segment);
  switch (mode) {
    case ShuffleMode::kIndex:
      return first | (b & ~segment);
    case ShuffleMode::kUp:
      return lane - b >= first ? lane - b : lane;
    case ShuffleMode::kDown:
      return lane + b <= last ? lane + b : lane;
    case ShuffleMode::kXor:
      return (lane ^ b) <= last ? lane ^ b : lane;
  }
  return lane;
}

template <class T>
T shuffle(const char* name, ShuffleMode mode, uint32_t mask, T value, unsigned operand, int width,
          Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  const Thread& me = here();
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(me, std::string(name) + " at " + site.text() + ": width must be a power of two up to 32");
  }
  Shuffle<T> record{value, value, shuffle_source(mode, me.lane, operand, width)};
  meet(name, mask, record, site);
  return record.result;
}

inline uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  Ballot record{predicate, 0};
  meet(name, mask, record, site);
  return record.result;
}

}  // namespace emulator
}  // namespace uhd
