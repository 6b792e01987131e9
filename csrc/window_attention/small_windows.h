// SPDX-License-Identifier: Apache-2.0
// Windows of side 1 to 4 on tensor cores, for half types. No torch here.
#pragma once
#include "window_attention/window_attention.h"

namespace uhd {
namespace cuda {

// Whether the two functions below can do it: dtype, head size, window side, and tensors that can be
// read 16 bytes at a time. Tensors that are null are not looked at.
bool small_windows_fit(const WindowAttention& args);

const char* small_windows_forward(const WindowAttention& args, void* stream);
const char* small_windows_backward(const WindowAttention& args, void* stream);

}  // namespace cuda
}  // namespace uhd
