// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels of a call. The choice looks at what the call has in common for all of its
// windows, not at their number (below 2^31 blocks), so that a window's result does not depend on
// its neighbours.
#include "window_attention/general_windows.h"
#include "window_attention/large_windows.h"
#include "window_attention/small_windows.h"
#include "window_attention/window_attention.h"

namespace uhd {
namespace cuda {

int64_t window_attention_backward_scratch(const WindowAttention& args) {
  if (small_windows_fit(args)) return 0;
  return large_windows_fit(args) ? large_windows_scratch(args) : general_windows_scratch(args);
}

const char* window_attention_forward(const WindowAttention& args, void* stream) {
  if (args.views.token_rows == 0) return nullptr;
  if (small_windows_fit(args)) return small_windows_forward(args, stream);
  if (large_windows_fit(args)) return large_windows_forward(args, stream);
  return general_windows_forward(args, stream);
}

const char* window_attention_backward(const WindowAttention& args, void* stream) {
  if (args.views.token_rows == 0) return nullptr;
  if (small_windows_fit(args)) return small_windows_backward(args, stream);
  if (large_windows_fit(args)) return large_windows_backward(args, stream);
  return general_windows_backward(args, stream);
}

}  // namespace cuda
}  // namespace uhd
