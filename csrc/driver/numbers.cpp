// SPDX-License-Identifier: Apache-2.0
#include "driver/numbers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace uhd {
namespace driver {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Format {
  const char* name;
  int digits;          // significant bits
  int least_exponent;  // of a normal number; below it the last place stays where it is
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {"float32", 24, -126};
    case DType::kFloat64:
      return {"float64", 53, -1022};
    case DType::kBFloat16:
      return {"bfloat16", 8, -126};
    case DType::kFloat16:
      break;
  }
  return {"float16", 11, -14};
}

// ---- 16 bits: sign, exponent, fraction

uint16_t encode_half(DType dtype, double value) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.digits - 1, exponent_bits = 15 - fraction_bits;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << fraction_bits);
  if (std::isnan(value)) return sign | infinity | 1;
  if (std::isinf(value)) return sign | infinity;
  const double size = std::fabs(value);
  if (size == 0) return sign;
  const int exponent = std::max(std::ilogb(size), format.least_exponent);
  const int place = static_cast<int>(std::ldexp(size, fraction_bits - exponent));
  // The leading bit of a normal number is 1 in the exponent field.
  return static_cast<uint16_t>(sign |
                               (((exponent - format.least_exponent) << fraction_bits) + place));
}

double decode_half(DType dtype, uint16_t bits) {
  const Format format = format_of(dtype);
  const int fraction_bits = format.digits - 1, exponent_bits = 15 - fraction_bits;
  const int field = (bits & 0x7fff) >> fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  double size;
  if (field == (1 << exponent_bits) - 1) {
    size = fraction ? kNaN : std::numeric_limits<double>::infinity();
  } else {
    const int leading = field ? 1 << fraction_bits : 0;
    size = std::ldexp(leading + fraction,
                      std::max(field, 1) - 1 + format.least_exponent - fraction_bits);
  }
  return bits & 0x8000 ? -size : size;
}

template <class T, class Convert>
std::vector<char> pack(const std::vector<double>& values, Convert&& convert) {
  std::vector<char> bytes(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    const T element = convert(values[i]);
    std::memcpy(&bytes[i * sizeof(T)], &element, sizeof(T));
  }
  return bytes;
}

template <class T, class Convert>
std::vector<double> unpack(const std::vector<char>& bytes, Convert&& convert) {
  std::vector<double> values(bytes.size() / sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T element;
    std::memcpy(&element, &bytes[i * sizeof(T)], sizeof(T));
    values[i] = convert(element);
  }
  return values;
}

}  // namespace

const char* name_of(DType dtype) { return format_of(dtype).name; }

double unit_roundoff(DType dtype) { return std::ldexp(1.0, -format_of(dtype).digits); }

double round_to(DType dtype, double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const Format format = format_of(dtype);
  const int exponent = std::max(std::ilogb(value), format.least_exponent);
  const int last_place = exponent - format.digits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(value, -last_place)), last_place);
}

std::vector<char> encode(DType dtype, const std::vector<double>& values) {
  if (dtype == DType::kFloat64) return pack<double>(values, [](double x) { return x; });
  if (dtype == DType::kFloat32) {
    return pack<float>(values, [](double x) { return static_cast<float>(x); });
  }
  return pack<uint16_t>(values, [&](double x) { return encode_half(dtype, x); });
}

std::vector<double> decode(DType dtype, const std::vector<char>& bytes) {
  if (dtype == DType::kFloat64) return unpack<double>(bytes, [](double x) { return x; });
  if (dtype == DType::kFloat32) return unpack<float>(bytes, [](float x) { return double{x}; });
  return unpack<uint16_t>(bytes, [&](uint16_t x) { return decode_half(dtype, x); });
}

Matrix random_matrix(Random& random, const char* name, DType dtype, int64_t rows, int64_t cols,
                     int64_t real_rows, int64_t gap, double mean) {
  std::normal_distribution<double> normal(mean, 1.0);
  Matrix matrix{name, dtype, rows, cols, cols + gap, {}};
  matrix.values.assign(static_cast<size_t>(rows * matrix.stride), kNaN);
  for (int64_t row = 0; row < real_rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      matrix.values[row * matrix.stride + col] = round_to(dtype, normal(random));
    }
  }
  return matrix;
}

}  // namespace driver
}  // namespace uhd
