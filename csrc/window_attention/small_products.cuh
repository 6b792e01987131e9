// SPDX-License-Identifier: Apache-2.0
// Products over a tile of 16 slots, with fragments that come from device memory without passing
// through shared memory.
//
// Both kinds of product leave us free to number columns as we like. In A B^T the channels are
// summed over: place t takes 8 neighbouring channels of its rows, which are the fragments of two
// steps of 16. In W X the channels are columns of the result: group g takes 8 neighbouring channels
// and gives each to another product of 8 columns, and then every lane ends with two times 8
// neighbouring channels of its rows of the result. These are 32 channels apart, so that the four
// lanes of a row store whole sectors of 32 bytes at a time. Head sizes that are no multiple of 32
// or 64 end with a narrower piece, whose channels are all neighbours.
#pragma once
#include "window_attention/small_weights.cuh"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

// 1, 2, 4 or 8 neighbouring halves, two in a register.
template <int kHalves>
struct Chunk {
  uint32_t word[(kHalves + 1) / 2];

  UHD_DEVICE void load(const void* from) {
    if constexpr (kHalves == 8) {
      const uint4 bits = load_16(from);
      word[0] = bits.x, word[1] = bits.y, word[2] = bits.z, word[3] = bits.w;
    } else if constexpr (kHalves == 4) {
      const uint2 bits = *static_cast<const uint2*>(from);
      word[0] = bits.x, word[1] = bits.y;
    } else if constexpr (kHalves == 2) {
      word[0] = *static_cast<const uint32_t*>(from);
    } else {
      word[0] = *static_cast<const uint16_t*>(from);
    }
  }
  UHD_DEVICE void clear() {
#pragma unroll
    for (uint32_t& w : word) w = 0;
  }
};

template <int kHalves>
UHD_DEVICE void store_halves(void* to, const uint32_t* word) {
  if constexpr (kHalves == 2) {
    *static_cast<uint32_t*>(to) = word[0];
  } else if constexpr (kHalves == 4) {
    *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kHalves / 8; ++i) {
      const uint32_t* w = word + 4 * i;
      store_16(static_cast<char*>(to) + 16 * i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

// One head of a tensor whose strides are below 2^31 bytes.
template <class T>
struct HeadRows {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* first;
  int row_bytes;

  template <class Void>
  UHD_DEVICE HeadRows(Void* tensor, TokenStrides strides, int head)
      : first(static_cast<Byte*>(tensor) + wide_product(head, bytes(strides.head))),
        row_bytes(bytes(strides.token)) {}

  // The channel of the row of a token.
  UHD_DEVICE T* at(int token, int channel) const {
    return reinterpret_cast<T*>(first + bytes(channel) + wide_product(token, row_bytes));
  }

 private:
  UHD_DEVICE static int bytes(int64_t elements) { return int(elements) * int(sizeof(T)); }
};

// ---- A B^T, summed over the channels

// This lane's part of its two rows, for A and for B alike.
template <class T, int kDim>
struct RowFragments {
  static constexpr int kWide = kDim / 32, kRest = kDim % 32;
  static_assert(kRest == 0 || kRest == 8 || kRest == 16, "a rest is one step of 8 or 16");
  uint32_t word[2][kDim / 8];

  UHD_DEVICE RowFragments(const HeadRows<const T>& head, const int (&tokens)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const T* row = head.at(tokens[r], 8 * lane_place());
#pragma unroll
      for (int i = 0; i < kWide; ++i) load<8>(row + 32 * i, word[r] + 4 * i);
      if constexpr (kRest > 0) {
        constexpr int kEach = kRest / 4;
        load<kEach>(head.at(tokens[r], 32 * kWide + kEach * lane_place()), word[r] + 4 * kWide);
      }
    }
  }

 private:
  template <int kEach>
  UHD_DEVICE static void load(const T* from, uint32_t* to) {
    Chunk<kEach> chunk;
    chunk.load(from);
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) to[i] = chunk.word[i];
  }
};

template <class T, int kDim>
UHD_DEVICE void dot_rows(const RowFragments<T, kDim>& a, const RowFragments<T, kDim>& b,
                         Square& out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[half][i] = 0.0f;
  }
  constexpr int kWords = kDim / 8;
#pragma unroll
  for (int k = 0; k + 1 < kWords; k += 2) {
    const uint32_t left[4] = {a.word[0][k], a.word[1][k], a.word[0][k + 1], a.word[1][k + 1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t right[2] = {b.word[half][k], b.word[half][k + 1]};
      mma_16x8x16<T>(out[half], left, right);
    }
  }
  if constexpr (kWords % 2 == 1) {
    const uint32_t left[2] = {a.word[0][kWords - 1], a.word[1][kWords - 1]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma_16x8x8<T>(out[half], left, b.word[half][kWords - 1]);
    }
  }
}

// ---- W X, summed over the slots

// Zeros for infinities and NaN.
template <class T>
UHD_DEVICE uint32_t finite_or_zero(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;
  if ((pair & kExponent) == kExponent) pair &= 0xffff0000;
  if ((pair >> 16 & kExponent) == kExponent) pair &= 0xffff;
  return pair;
}

// out = W x; x in this lane's columns of W, out in its rows.
template <class T>
struct Mix {
  HeadRows<const T> x;
  const int (&x_tokens)[4];
  HeadRows<T> out;
  const int (&out_tokens)[2];
};

constexpr int kWholeTile = -1;

// The fragments of kEach products of 8 columns. With `some`, only rows of `slots` count.
template <class T, int kEach>
UHD_DEVICE void load_columns(const Mix<T>& mix, int begin, bool some, uint32_t slots,
                             uint32_t (&b)[kEach][2]) {
  Chunk<kEach> chunk[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int group = kEach == 8 ? lane_group() / 2 + lane_group() % 2 * 4 : lane_group();
    chunk[i].load(mix.x.at(mix.x_tokens[i], begin + kEach * group));
  }
  if (some) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!(slots >> column_slot(i) & 1)) chunk[i].clear();
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      b[j][half] = __byte_perm(chunk[2 * half].word[j / 2], chunk[2 * half + 1].word[j / 2],
                               j % 2 ? 0x7632 : 0x5410);
    }
  }
}

// Two rows of kEach products, scaled and rounded: channel n of this lane is column n / kEach of
// product n % kEach.
template <class T, int kEach>
UHD_DEVICE void narrow_rows(const float (&sum)[kEach][4], const RowScale& scale,
                            uint32_t (&word)[2][kEach]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const auto value = [&](int n) {
      const float x = sum[n % kEach][2 * r + n / kEach];
      return std::is_same_v<T, Float16> ? x * scale.inverse[r] : x;
    };
#pragma unroll
    for (int i = 0; i < kEach; ++i) word[r][i] = narrow_pair<T>(value(2 * i), value(2 * i + 1));
  }
}

template <class T, int kWords>
UHD_DEVICE bool any_non_finite(const uint32_t (&word)[kWords]) {
  uint32_t trace = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) trace = trace_non_finite<T>(word[i], trace);
  return __any_sync(kFullWarp, (trace & 0x7fff7fff) != 0);
}

// Writes the columns [begin, begin + 8 kEach) of W X.
//
// W is zero between windows, but 0 * infinity is not. Then a column of X with such a value spoils
// that column in every row of the result, so a look at one row tells; the tile is done again window
// by window, each with the others' rows taken as zeros. `low`, which may be zero or of either sign,
// sees zeros for such values. Where all is finite this gives the bits that the whole tile gives.
template <class T, int kEach>
UHD_DEVICE void mix_columns(const Weights<T>& weights, const SmallTile& tile, const RowScale& scale,
                            const Mix<T>& mix, int begin) {
  for (int window = kWholeTile; window < tile.num_windows(); ++window) {
    const bool whole = window == kWholeTile;
    const uint32_t slots = whole ? tile.present : tile.present_in(window);
    uint32_t b[kEach][2];
    load_columns<T, kEach>(mix, begin, !whole, slots, b);
    float sum[kEach][4] = {};
#pragma unroll
    for (int j = 0; j < kEach; ++j) mma_16x8x16<T>(sum[j], weights.high, b[j]);
    if (!whole) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        b[j][0] = finite_or_zero<T>(b[j][0]), b[j][1] = finite_or_zero<T>(b[j][1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) mma_16x8x16<T>(sum[j], weights.low, b[j]);

    uint32_t word[2][kEach];
    narrow_rows<T, kEach>(sum, scale, word);
    if (whole && any_non_finite<T, kEach>(word[0])) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (slots >> row_slot(r) & 1) {
        if constexpr (kEach == 8) {  // whole 32-byte sectors in each store
          T* to = mix.out.at(mix.out_tokens[r], begin + 8 * lane_place());
          store_halves<8>(to, word[r]);
          store_halves<8>(to + 32, word[r] + 4);
        } else {
          store_halves<2 * kEach>(mix.out.at(mix.out_tokens[r], begin + 2 * kEach * lane_place()),
                                  word[r]);
        }
      }
    }
    if (whole) return;
  }
}

template <class T, int kDim>
UHD_DEVICE void mix_rows(const Weights<T>& weights, const SmallTile& tile, const RowScale& scale,
                         const Mix<T>& mix) {
#pragma unroll
  for (int begin = 0; begin + 64 <= kDim; begin += 64) {
    mix_columns<T, 8>(weights, tile, scale, mix, begin);
  }
  if constexpr (kDim % 64 > 0) {
    mix_columns<T, kDim % 64 / 8>(weights, tile, scale, mix, kDim / 64 * 64);
  }
}

}  // namespace
}  // namespace uhd
