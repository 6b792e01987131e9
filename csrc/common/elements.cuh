// SPDX-License-Identifier: Apache-2.0
// Elements in device memory: conversions, and loads and stores of several at once.
//
// Every conversion rounds to nearest, ties to even. Memory is touched in pieces of 16 bytes where
// pointer and stride allow it (aligned_16), else element by element.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "common/device.cuh"
#include "common/dtype.h"

namespace uhd {
namespace {

// ---- one element

UHD_DEVICE float widen(float x) { return x; }
UHD_DEVICE double widen(double x) { return x; }

#ifdef UHD_EMULATED
UHD_DEVICE float widen(BFloat16 x) { return emulator::widen(x); }
UHD_DEVICE float widen(Float16 x) { return emulator::widen(x); }
#else
UHD_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
UHD_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
#endif

// ---- two halves in one register, the first in the low bits

template <class T>
UHD_DEVICE float low_half(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair)});
}
template <class T>
UHD_DEVICE float high_half(uint32_t pair) {
  return widen(T{static_cast<uint16_t>(pair >> 16)});
}

template <class T>
UHD_DEVICE uint32_t narrow_pair(float low, float high);

#ifdef UHD_EMULATED
template <class T>
UHD_DEVICE uint32_t narrow_pair(float low, float high) {
  return emulator::narrow<T>(low).bits | uint32_t(emulator::narrow<T>(high).bits) << 16;
}
#else
template <>
UHD_DEVICE uint32_t narrow_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
UHD_DEVICE uint32_t narrow_pair<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

template <class T>
UHD_DEVICE T narrow(AccumulateT<T> x) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(narrow_pair<T>(x, 0.0f))};
  } else {
    return x;
  }
}

// ---- several neighbours

// Elements in 16 bytes.
template <class T>
constexpr int kPack = 16 / int(sizeof(T));

// Rows of elements in memory; null for a tensor that is not there.
struct Rows {
  const void* pointer;
  int64_t stride;  // in elements
};

// Whether rows can be read 16 bytes at a time.
template <class T>
inline bool aligned_16(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.pointer) % 16 == 0 && rows.stride % kPack<T> == 0;
}

UHD_DEVICE uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
UHD_DEVICE void store_16(void* to, uint4 bits) {
  // As one integer: nvcc splits the store of a struct into its members, and may leave it at that.
  const uint64_t low = bits.x | uint64_t(bits.y) << 32, high = bits.z | uint64_t(bits.w) << 32;
  *static_cast<unsigned __int128*>(to) = low | static_cast<unsigned __int128>(high) << 64;
}

// kWidth elements, widened; kWidth is kPack<T>, for one 16-byte access, or 1.
template <class T, int kWidth>
struct Elements {
  static_assert(kWidth == 1 || kWidth == kPack<T>, "an access is 16 bytes or one element");
  using S = AccumulateT<T>;
  S value[kWidth];

  UHD_DEVICE static Elements zero() {
    Elements x;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x.value[i] = S(0);
    return x;
  }
  UHD_DEVICE Elements& operator+=(const Elements& other) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) value[i] += other.value[i];
    return *this;
  }
  UHD_DEVICE static Elements load(const T* from) {
    Elements x;
    if constexpr (kWidth == 1) {
      x.value[0] = widen(*from);
    } else {
      x.unpack(load_16(from));
    }
    return x;
  }
  UHD_DEVICE void store(T* to) const {
    if constexpr (kWidth == 1) {
      *to = narrow<T>(value[0]);
    } else {
      store_16(to, pack());
    }
  }

  UHD_DEVICE void unpack(uint4 bits) {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (sizeof(T) == 2) {
        value[i] = i % 2 ? high_half<T>(word[i / 2]) : low_half<T>(word[i / 2]);
      } else if constexpr (sizeof(T) == 4) {
        value[i] = __uint_as_float(word[i]);
      } else {
        value[i] = __hiloint2double(int(word[2 * i + 1]), int(word[2 * i]));
      }
    }
  }
  UHD_DEVICE uint4 pack() const {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        word[i] = narrow_pair<T>(value[2 * i], value[2 * i + 1]);
      } else if constexpr (sizeof(T) == 4) {
        word[i] = __float_as_uint(value[i]);
      } else {
        word[i] = i % 2 ? uint32_t(__double2hiint(value[i / 2])) : __double2loint(value[i / 2]);
      }
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
};

// Calls function(T{}, width) for kernels that touch rows of `channels` elements: width is a
// constant, kPack<T> where all rows, and rows of a contiguous tensor, can be read 16 bytes at a
// time, else 1. Returns what function does.
template <class Function>
inline const char* with_width(DType dtype, int64_t channels, std::initializer_list<Rows> tensors,
                              Function&& function) {
  const char* result = nullptr;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    bool aligned = channels % kPack<T> == 0;
    for (const Rows& rows : tensors) aligned = aligned && aligned_16<T>(rows);
    result = aligned ? function(element, std::integral_constant<int, kPack<T>>{})
                     : function(element, std::integral_constant<int, 1>{});
  });
  return result;
}

// ---- arithmetic

// 2^x; for half types, whose rounding is far above the error of the instruction.
UHD_DEVICE float exp2_approximate(float x) {
#ifdef UHD_EMULATED
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to the last bit or two, and zero where that is subnormal; for half types.
UHD_DEVICE float reciprocal_approximate(float x) {
#ifdef UHD_EMULATED
  const float y = 1.0f / x;
  return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / sqrt(x), to the last bit or two.
#ifdef UHD_EMULATED
UHD_DEVICE float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
UHD_DEVICE double reciprocal_root(double x) { return 1.0 / std::sqrt(x); }
#else
UHD_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
UHD_DEVICE double reciprocal_root(double x) { return rsqrt(x); }
#endif

// Both halves of `trace` plus 0 times those of `pair`: once an infinity or NaN was among the pairs,
// (trace & 0x7fff7fff) is not zero.
template <class T>
UHD_DEVICE uint32_t trace_non_finite(uint32_t pair, uint32_t trace);

#ifdef UHD_EMULATED
template <class T>
UHD_DEVICE uint32_t trace_non_finite(uint32_t pair, uint32_t trace) {
  return narrow_pair<T>(low_half<T>(pair) * 0 + low_half<T>(trace),
                        high_half<T>(pair) * 0 + high_half<T>(trace));
}
#else
template <>
UHD_DEVICE uint32_t trace_non_finite<BFloat16>(uint32_t pair, uint32_t trace) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(trace) : "r"(pair), "r"(0));
  return trace;
}
template <>
UHD_DEVICE uint32_t trace_non_finite<Float16>(uint32_t pair, uint32_t trace) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(trace) : "r"(pair), "r"(0));
  return trace;
}
#endif

}  // namespace
}  // namespace uhd
