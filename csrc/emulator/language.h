// SPDX-License-Identifier: Apache-2.0
// The words of the CUDA language that need no running kernel: keywords, vector types, arithmetic.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// Fixed arrays could neither be poisoned nor bounded; kernels use dynamic shared memory only.
#define __shared__ static_assert(false, "use dynamic_shared<T>() instead of __shared__");

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define UHD_VECTOR_2(T, name, bytes)            \
  struct __attribute__((aligned(bytes))) name { \
    T x, y;                                     \
  };                                            \
  constexpr name make_##name(T x, T y) { return name{x, y}; }
#define UHD_VECTOR_4(T, name, bytes)            \
  struct __attribute__((aligned(bytes))) name { \
    T x, y, z, w;                               \
  };                                            \
  constexpr name make_##name(T x, T y, T z, T w) { return name{x, y, z, w}; }
UHD_VECTOR_2(unsigned short, ushort2, 4)
UHD_VECTOR_4(unsigned short, ushort4, 8)
UHD_VECTOR_2(int, int2, 8)
UHD_VECTOR_4(int, int4, 16)
UHD_VECTOR_2(unsigned, uint2, 8)
UHD_VECTOR_4(unsigned, uint4, 16)
UHD_VECTOR_2(float, float2, 8)
UHD_VECTOR_4(float, float4, 16)
UHD_VECTOR_2(double, double2, 16)
UHD_VECTOR_2(long long, longlong2, 16)
#undef UHD_VECTOR_2
#undef UHD_VECTOR_4

using std::max;
using std::min;

template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

template <class To, class From>
inline To uhd_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "both must have the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return uhd_bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return uhd_bit_cast<float>(x); }
inline int __float_as_int(float x) { return uhd_bit_cast<int>(x); }
inline float __int_as_float(int x) { return uhd_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return uhd_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return uhd_bit_cast<double>(x); }
inline int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
inline double __hiloint2double(int high, int low) {
  const uint64_t upper = static_cast<uint32_t>(high);
  return uhd_bit_cast<double>(upper << 32 | static_cast<uint32_t>(low));
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Byte i of the result is byte (selector >> 4 i & 7) of y:x, where x holds the low four.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  if (selector & 0x8888) {
    throw std::logic_error("__byte_perm: a selector digit above 7 replicates signs, not emulated");
  }
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned source = selector >> 4 * i & 7;
    result |= static_cast<unsigned>(bytes >> 8 * source & 0xff) << 8 * i;
  }
  return result;
}
