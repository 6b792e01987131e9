// SPDX-License-Identifier: Apache-2.0
// Fixed-width vectors for the CPU kernels, on the compiler's vector extension.
//
// Include this from *_cpu.cpp files only. They are compiled once per instruction set, so everything
// here has internal linkage: a weak symbol could otherwise be taken from the AVX-512 object on a
// processor without it.
#pragma once
#include <cmath>
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

// ---- load and store: T in memory, accumulation type in the register
// ------------------------------------

template <class S>
inline Vec<S> load(const S* p) {
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
inline void store(S* p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec<float> load(const BFloat16* p) {
  HalfVec bits;
  std::memcpy(&bits, p, sizeof bits);
  const WordVec words = __builtin_convertvector(bits, WordVec) << 16;
  return reinterpret_cast<Vec<float>>(words);
}
inline void store(BFloat16* p, Vec<float> v) {
  // Round to nearest even on the bits; a NaN keeps a set mantissa bit instead of rounding up to
  // infinity.
  const WordVec words = reinterpret_cast<WordVec>(v);
  const WordVec rounded = words + 0x7fff + ((words >> 16) & 1);
  const WordVec quiet = words | 0x400000;
  const WordVec chosen = v == v ? rounded : quiet;
  const HalfVec bits = __builtin_convertvector(chosen >> 16, HalfVec);
  std::memcpy(p, &bits, sizeof bits);
}

#if defined(UHD_ISA_AVX512)
inline Vec<float> load(const Float16* p) {
  // The zero-masked forms: g++ 12 warns about the undefined register inside the plain ones.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff,
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(Float16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(UHD_ISA_AVX2)
inline Vec<float> load(const Float16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(Float16* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline float widen(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
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
inline Float16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};   // NaN
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal in half: adding 0.5 lets the float unit round to 2^-24
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    uint32_t raw;
    std::memcpy(&raw, &shifted, sizeof raw);
    return {static_cast<uint16_t>(sign | (raw - 0x3f000000))};
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline Vec<float> load(const Float16* p) {
  Vec<float> v{};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
}
inline void store(Float16* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow(v[i]);
}
#endif

// ---- the first n lanes, 0 < n < kLanes; lanes past n read as zero
// ---------------------------------------

#if defined(UHD_ISA_AVX512)
inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec<float> load(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline void store(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
inline Vec<double> load(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
}
inline void store(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), (__m512d)v);
}
template <class Half>
inline Vec<float> load(const Half* p, int n) {
  Half lanes[kLanes<float>];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes),
                      _mm256_maskz_loadu_epi16(first_lanes(n), p));
  return load(lanes);
}
template <class Half>
inline void store(Half* p, Vec<float> v, int n) {
  Half lanes[kLanes<float>];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n),
                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
}
#else
template <class T>
inline Vec<AccumulateT<T>> load(const T* p, int n) {
  T lanes[kLanes<AccumulateT<T>>] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec<AccumulateT<T>> v, int n) {
  T lanes[kLanes<AccumulateT<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}
#endif

// Calls body(offset, load, store) for the channels [0, channels): whole vectors first, then the
// masked rest.
template <class T, class Body>
inline __attribute__((always_inline)) void for_channels(int64_t channels, Body&& body) {
  using S = AccumulateT<T>;
  constexpr int lanes = kLanes<S>;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    body(c, [](const auto* p) { return load(p); }, [](auto* p, Vec<S> v) { store(p, v); });
  }
  if (const int rest = static_cast<int>(channels - c)) {
    body(
        c, [rest](const auto* p) { return load(p, rest); },
        [rest](auto* p, Vec<S> v) { store(p, v, rest); });
  }
}

// ---- arithmetic
// ----------------------------------------------------------------------------------------

template <class S>
inline Vec<S> max(Vec<S> a, Vec<S> b) {
  return a > b ? a : b;
}

inline Vec<double> exp(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// exp for float: x = n ln2 + r with |r| <= ln2 / 2, then a degree-6 polynomial of e^r, times 2^n.
// Below -87.336 it returns 0 and above 88.376 infinity, where 2^n would leave the normal floats; a
// NaN stays a NaN.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-87.33655f), high = splat(88.3762626647949f);
  const Vec<float> clamped = x < low ? low : x > high ? high : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = clamped * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = clamped - n * 0.693359375f;  // ln2 in two parts, the first with few bits
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The low bits of `shifted` are the integer n; moved into the exponent field they make 2^n.
  const WordVec exponent = (reinterpret_cast<WordVec>(shifted) << 23) + 0x3f800000;
  const Vec<float> y = p * reinterpret_cast<Vec<float>>(exponent);
  const Vec<float> bounded = x < low ? splat(0.0f) : x > high ? splat(INFINITY) : y;
  return x == x ? bounded : x;
}

}  // namespace
}  // namespace uhd
