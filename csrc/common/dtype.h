// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels, free of torch.
#pragma once
#include <cstdint>

namespace uhd {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Half types accumulate in float, float64 stays float64.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using AccumulateT = typename Accumulate<T>::type;

// In bytes.
constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Calls function(T{}) with the element type that dtype stands for.
template <class Function>
inline void dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kFloat64:
      return function(double{});
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
  }
}

}  // namespace uhd
