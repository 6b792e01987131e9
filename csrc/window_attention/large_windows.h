// SPDX-License-Identifier: Apache-2.0
// Attention on tensor cores for windows of up to 16 x 16 tokens, BFloat16 and Float16. A window may
// hold any smaller number of tokens; windows up to 4 x 4 have a faster kernel of their own.
#pragma once
#include "window_attention/window_attention.h"

namespace uhd {
namespace cuda {

// Whether these kernels can run the call: the forward pass, or where args.grad_out is set the
// backward pass. They need a window side from 5 to 16, a head size of 64, 72, 80, 96 or 128,
// 16-byte aligned rows and enough shared memory.
bool large_windows_fit(const WindowAttention& args);

// Elements of args.scratch that the backward pass needs.
int64_t large_windows_scratch(const WindowAttention& args);

// All windows; nullptr, or the text of an error.
const char* large_windows_forward(const WindowAttention& args, void* stream);
const char* large_windows_backward(const WindowAttention& args, void* stream);

}  // namespace cuda
}  // namespace uhd
