// SPDX-License-Identifier: Apache-2.0
// Element types on the host: every value is kept as a double, which all of them fit in exactly.
#pragma once
#include <cstdint>
#include <random>
#include <vector>

#include "common/dtype.h"

namespace uhd {
namespace driver {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

const char* name_of(DType dtype);

// The type that sums, statistics and parameters of a LayerNorm have.
constexpr DType wide(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Half the distance from 1 to the next number: the largest relative error of one rounding.
double unit_roundoff(DType dtype);

// The nearest number of the type, ties to even.
double round_to(DType dtype, double value);

// Numbers of the type as they are in memory, and back. Encoding rounds nothing.
std::vector<char> encode(DType dtype, const std::vector<double>& values);
std::vector<double> decode(DType dtype, const std::vector<char>& bytes);

using Random = std::mt19937_64;

// A tensor of rows: NaN in the rows from `real_rows` on, and between the rows where the stride is
// larger than a row. Kernels must not read those.
struct Matrix {
  const char* name;
  DType dtype;
  int64_t rows, cols, stride;
  std::vector<double> values;
};

// Normal around `mean` with deviation 1, rounded to the type.
Matrix random_matrix(Random& random, const char* name, DType dtype, int64_t rows, int64_t cols,
                     int64_t real_rows, int64_t gap = 0, double mean = 0.0);

}  // namespace driver
}  // namespace uhd
