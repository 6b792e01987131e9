// SPDX-License-Identifier: Apache-2.0
// The tensor core and its loads: ldmatrix, movmatrix and mma.sync, with the fragment layouts of the
// PTX ISA. In an 8 x 8 matrix of 16-bit elements lane l holds row l / 4, columns 2 (l % 4) (low
// half) and 2 (l % 4) + 1 (high half).
#pragma once
#include <cstdint>
#include <cstring>

#include "emulator/collectives.h"
#include "emulator/copies.h"
#include "emulator/halves.h"

namespace uhd {
namespace emulator {

inline uint16_t half_of(uint32_t pair, int half) {
  return static_cast<uint16_t>(pair >> 16 * half);
}

struct LoadMatrix {
  const void* row;  // lane 8 i + r gives the address of row r of matrix i
  uint32_t* registers;
  int count;
  bool transpose;

  static void complete(const Meeting& meeting) {
    const LoadMatrix& first = meeting.record<LoadMatrix>(0);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const LoadMatrix& record = meeting.record<LoadMatrix>(lane);
      if (record.count != first.count || record.transpose != first.transpose) {
        fail(meeting.threads[lane], "ldmatrix: lanes of a warp disagree on its form");
      }
      if (lane < 8 * first.count) check_shared_16(meeting.threads[lane], "ldmatrix", record.row);
    }
    for (int matrix = 0; matrix < first.count; ++matrix) load(meeting, matrix, first.transpose);
  }

 private:
  static void load(const Meeting& meeting, int matrix, bool transpose) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(element[row], meeting.record<LoadMatrix>(8 * matrix + row).row, 16);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = transpose ? element[j][i] : element[i][j];
      const uint32_t high = transpose ? element[j + 1][i] : element[i][j + 1];
      meeting.record<LoadMatrix>(lane).registers[matrix] = low | high << 16;
    }
  }
};

struct MoveMatrix {
  uint32_t value, result;

  static void complete(const Meeting& meeting) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto element = [&](int i, int j) -> uint32_t {
        return half_of(meeting.record<MoveMatrix>(4 * i + j / 2).value, j % 2);
      };
      meeting.record<MoveMatrix>(lane).result = element(column, row) | element(column + 1, row)
                                                                           << 16;
    }
  }
};

// D (16 x 8) += A (16 x kDepth) B (kDepth x 8).
template <class T, int kDepth>
struct MultiplyAdd {
  float* d;
  const uint32_t *a, *b;

  static void complete(const Meeting& meeting) {
    float a[16][kDepth], b[kDepth][8], d[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const MultiplyAdd& record = meeting.record<MultiplyAdd>(lane);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) d[group + i / 2 * 8][pair + i % 2] = record.d[i];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kDepth / 4; ++i) {
          a[group + i % 2 * 8][pair + half + i / 2 * 8] = widen(T{half_of(record.a[i], half)});
        }
        for (int i = 0; i < kDepth / 8; ++i) {
          b[pair + half + i * 8][group] = widen(T{half_of(record.b[i], half)});
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      float* out = meeting.record<MultiplyAdd>(lane).d;
      for (int i = 0; i < 4; ++i) out[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
};

// Loads `count` (1, 2 or 4) 8 x 8 matrices of 16-bit elements, one register each.
inline void ldmatrix(uint32_t* registers, int count, const void* row, bool transpose,
                     Site site = Site::here()) {
  if (count != 1 && count != 2 && count != 4) {
    fail(here(), "ldmatrix loads 1, 2 or 4 matrices, got " + std::to_string(count));
  }
  LoadMatrix record{row, registers, count, transpose};
  meet("ldmatrix", kFullWarp, record, site);
}

inline uint32_t movmatrix(uint32_t value, Site site = Site::here()) {
  MoveMatrix record{value, 0};
  meet("movmatrix", kFullWarp, record, site);
  return record.result;
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 Site site = Site::here()) {
  MultiplyAdd<T, 16> record{d, a, b};
  meet("mma.m16n8k16", kFullWarp, record, site);
}

template <class T>
void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Site site = Site::here()) {
  MultiplyAdd<T, 8> record{d, a, &b};
  meet("mma.m16n8k8", kFullWarp, record, site);
}

}  // namespace emulator
}  // namespace uhd
