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

#include "common/half.h"

namespace uhd {
namespace {

// ---- load and store: T in memory, accumulation type in the register

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

template <class Half>
inline Vec<float> load_half(const Half* p) {
  HalfVec bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen(p, bits);
}
template <class Half>
inline void store_half(Half* p, Vec<float> v) {
  const HalfVec bits = narrow(p, v);
  std::memcpy(p, &bits, sizeof bits);
}
inline Vec<float> load(const BFloat16* p) { return load_half(p); }
inline Vec<float> load(const Float16* p) { return load_half(p); }
inline void store(BFloat16* p, Vec<float> v) { store_half(p, v); }
inline void store(Float16* p, Vec<float> v) { store_half(p, v); }

// ---- the first n lanes, 0 < n < kLanes; lanes past n read as zero

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
  return widen(p, (HalfVec)_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
template <class Half>
inline void store(Half* p, Vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)narrow(p, v));
}
#else
template <class T>
inline Vec<AccumulateT<T> > load(const T* p, int n) {
  T lanes[kLanes<AccumulateT<T> >] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec<AccumulateT<T> > v, int n) {
  T lanes[kLanes<AccumulateT<T> >];
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
// Below -87.336, where 2^n would leave the normal floats, it returns 0; above 88.376, or 88.722
// with AVX-512, infinity; a NaN stays a NaN.
inline Vec<float> exp(Vec<float> x) {
  const Vec<float> low = splat(-87.33655f);
#if defined(UHD_ISA_AVX512)
  // Both return their last operand where one is a NaN. e^100 is infinite, and no larger n occurs.
  const __m512 raised = _mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
  const Vec<float> clamped = (Vec<float>)_mm512_maskz_min_ps(0xffff, (__m512)splat(100.0f), raised);
#else
  const Vec<float> high = splat(88.3762626647949f);
  const Vec<float> clamped = x < low ? low : x > high ? high : x;
#endif
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
#if defined(UHD_ISA_AVX512)
  const __mmask16 not_low = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(not_low, (__m512)p, (__m512)n);
#else
  // The low bits of `shifted` are the integer n; moved into the exponent field they make 2^n.
  const WordVec exponent = (reinterpret_cast<WordVec>(shifted) << 23) + 0x3f800000;
  const Vec<float> y = p * reinterpret_cast<Vec<float> >(exponent);
  const Vec<float> bounded = x < low ? splat(0.0f) : x > high ? splat(INFINITY) : y;
  return x == x ? bounded : x;
#endif
}

}  // namespace
}  // namespace uhd
