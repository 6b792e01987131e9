// SPDX-License-Identifier: Apache-2.0
// The head sizes and element types that the kernels on tensor cores are compiled for. No torch
// here.
#pragma once
#include <type_traits>

#include "window_attention/window_attention.h"

namespace uhd {
namespace {

template <class T, class Function>
inline const char* with_head_dim(int64_t head_dim, Function&& function) {
  switch (head_dim) {
    case 64:
      return function(T{}, std::integral_constant<int, 64>{});
    case 72:
      return function(T{}, std::integral_constant<int, 72>{});
    case 80:
      return function(T{}, std::integral_constant<int, 80>{});
    case 96:
      return function(T{}, std::integral_constant<int, 96>{});
    case 128:
      return function(T{}, std::integral_constant<int, 128>{});
  }
  return "window_attention: no kernel on tensor cores has this head size";
}

// Calls function(T{}, head_dim) with a half type and a constant head size, and returns what it
// does; the text of an error for other sizes.
template <class Function>
inline const char* with_half_and_head_dim(const WindowAttention& args, Function&& function) {
  if (args.dtype == DType::kBFloat16) return with_head_dim<BFloat16>(args.head_dim, function);
  return with_head_dim<Float16>(args.head_dim, function);
}

}  // namespace
}  // namespace uhd
