// SPDX-License-Identifier: Apache-2.0
// A linear layer and its GELU as one call of cuBLASLt, for the glue of linear_activation.
#pragma once
#include <optional>

#include "common/glue.h"

namespace uhd {
namespace cublaslt {

// The version of the library that torch has loaded, such as 130101 for 13.1.1. 0 where it has
// loaded none, -1 where this file was compiled without cublasLt.h.
int64_t version();

// h = gelu_tanh(x) with x = z weight^T + bias, (R, O), in bfloat16 or float16. The sums, the bias
// and the GELU are in float32; h and x are rounded once each. x is written to u unless u is empty.
// Returns false, with nothing written, where cuBLASLt is absent or has no kernel for the arguments.
#ifdef UHD_WITH_CUDA
bool linear_gelu(const Tensor& z, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& h, const Tensor& u);
#else
inline bool linear_gelu(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                        const Tensor&) {
  return false;
}
#endif

}  // namespace cublaslt
}  // namespace uhd
