// SPDX-License-Identifier: Apache-2.0
// Window attention on the CUDA cores, for whatever the tensor-core kernels do not take: any dtype,
// head size, window, stride and alignment. No torch here.
#pragma once
#include "window_attention/window_attention.h"

namespace uhd {
namespace cuda {

const char* general_windows_forward(const WindowAttention& args, void* stream);
// Both read and write args.scratch, one RowStatistics for each token and head.
const char* general_windows_backward(const WindowAttention& args, void* stream);
int64_t general_windows_scratch(const WindowAttention& args);

}  // namespace cuda
}  // namespace uhd
