// SPDX-License-Identifier: Apache-2.0
// Conversions between 16-bit floats and float32, rounding to nearest even like cvt.rn.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "emulator/language.h"

namespace uhd {
namespace emulator {

inline float widen(BFloat16 half) {
  return __uint_as_float(static_cast<uint32_t>(half.bits) << 16);
}

inline float widen(Float16 half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  const uint32_t magnitude = half.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  }
  if (magnitude < 0x400) {  // zero or subnormal: a multiple of 2^-24
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return __uint_as_float(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

template <class T>
T narrow(float value);

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = __float_as_uint(value);
  const uint32_t odd = bits >> 16 & 1;
  return {static_cast<uint16_t>((bits + 0x7fff + odd) >> 16)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  // Adding a power of two whose last place is that of the result rounds there: 2^-24 for
  // subnormals, else 2^-10 of the leading bit.
  const uint32_t exponent = std::max(__float_as_uint(magnitude) >> 23, 127u - 14u);
  const float anchor = __uint_as_float((exponent + 13) << 23);
  const uint32_t steps = __float_as_uint(magnitude + anchor) - __float_as_uint(anchor);
  return {static_cast<uint16_t>(sign | (((exponent - 113) << 10) + steps))};
}

}  // namespace emulator
}  // namespace uhd
