// SPDX-License-Identifier: Apache-2.0
// Vector types of the CPU kernels, and conversion between halves and floats. See vec.h for where it
// may be included.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#if defined(UHD_ISA_AVX2) || defined(UHD_ISA_AVX512)
#include <immintrin.h>
#endif

namespace uhd {
namespace {

#if defined(UHD_ISA_AVX512)
constexpr int kVectorBytes = 64;
#else  // without AVX the compiler splits each vector into two SSE or NEON registers
constexpr int kVectorBytes = 32;
#endif

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

typedef uint32_t WordVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));

template <class S>
inline Vec<S> splat(S value) {
  return Vec<S>{} + value;
}

// In all of these the pointer only selects the type.

inline WordVec zero_extend(HalfVec bits) {
  // g++ 12 splits __builtin_convertvector into two halves and joins them again.
#if defined(UHD_ISA_AVX512)
  return (WordVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#elif defined(UHD_ISA_AVX2)
  return (WordVec)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, WordVec);
#endif
}
inline Vec<float> widen(const BFloat16*, HalfVec bits) {
  return reinterpret_cast<Vec<float>>(zero_extend(bits) << 16);
}
// Rounds to nearest even on the bits; a NaN keeps a set mantissa bit instead of becoming infinity.
inline HalfVec narrow(BFloat16*, Vec<float> v) {
  const WordVec words = reinterpret_cast<WordVec>(v);
#if defined(UHD_ISA_AVX512)
  // With masks these are five instructions; g++ 12 makes ten of the lines below. AVX512-BF16 has
  // one for it, which takes subnormal floats for zero: ADR 0005.
  typedef uint16_t AllHalves __attribute__((vector_size(kVectorBytes)));
  constexpr AllHalves high = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i bits = (__m512i)words, up = (__m512i)(words + 0x7fff);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, (__m512i)(WordVec{} + 0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(up, odd, up, (__m512i)(WordVec{} + 1));
  // Two nibbles of 2: where v is a quiet or a signalling NaN, take v, made quiet.
  const __m512 chosen =
      _mm512_fixupimm_ps((__m512)rounded, (__m512)v, (__m512i)(WordVec{} + 0x22), 0);
  const __m512i halves = _mm512_maskz_permutexvar_epi16(0xffff, (__m512i)high, (__m512i)chosen);
  HalfVec result;
  std::memcpy(&result, &halves, sizeof result);
  return result;
#else
  const WordVec rounded = words + 0x7fff + ((words >> 16) & 1);
  const WordVec chosen = v == v ? rounded : words | 0x400000;
  return __builtin_convertvector(chosen >> 16, HalfVec);
#endif
}

#if defined(UHD_ISA_AVX512)

// The zero-masked conversions: g++ 12 warns about the undefined register inside the plain ones.
inline Vec<float> widen(const Float16*, HalfVec bits) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
}
inline HalfVec narrow(Float16*, Vec<float> v) {
  return (HalfVec)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(UHD_ISA_AVX2)

inline Vec<float> widen(const Float16*, HalfVec bits) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
}
inline HalfVec narrow(Float16*, Vec<float> v) {
  return (HalfVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}

#else

inline float widen_one(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;  // infinity or NaN
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000);  // normal: move the exponent bias from 15 to 127
  } else {
    const float magnitude = static_cast<float>(rest) * 0x1p-24f;  // zero and subnormal, exact
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t narrow_one(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 makes the float unit round to 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    uint32_t raw;
    std::memcpy(&raw, &shifted, sizeof raw);
    return static_cast<uint16_t>(sign | (raw - 0x3f000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}
inline Vec<float> widen(const Float16*, HalfVec bits) {
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen_one(bits[i]);
  return v;
}
inline HalfVec narrow(Float16*, Vec<float> v) {
  HalfVec bits{};
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = narrow_one(v[i]);
  return bits;
}

#endif

}  // namespace
}  // namespace uhd
