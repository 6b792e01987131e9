// SPDX-License-Identifier: Apache-2.0
// The rotary embedding of queries or keys, in front of the kernels for attention, and that of their
// gradients behind them. A block takes a token, a thread some pairs of channels.
#include "common/elements.cuh"
#include "window_attention/window_attention.h"

namespace uhd {
namespace {

struct Traits {
  static constexpr int kThreads = 128;
};

template <class T>
__global__ void __launch_bounds__(Traits::kThreads) rotate_rows(const RotateHeads args) {
  using S = AccumulateT<T>;
  const int64_t token = blockIdx.x;
  if (token >= args.views.num_tokens()) return;
  const T* x = static_cast<const T*>(args.x) + token * args.x_strides.token;
  T* out = static_cast<T*>(args.out) + token * args.out_stride;
  const S* cos = static_cast<const S*>(args.cos) + token * args.table_strides.token;
  const S* sin = static_cast<const S*>(args.sin) + token * args.table_strides.token;
  // A pair is one channel and the one `apart` further on, in groups of twice as many.
  const int pairs = int(args.head_dim) / 2;
  const int apart = args.parts == 0 ? 1 : pairs / int(args.parts);
  for (int i = threadIdx.x; i < int(args.heads) * pairs; i += Traits::kThreads) {
    const int head = i / pairs, pair = i - head * pairs;
    const int first = pair + pair / apart * apart, second = first + apart;
    const int64_t row = head * args.x_strides.head, angles = head * args.table_strides.head;
    const S a = widen(x[row + first]), b = widen(x[row + second]);
    const S sin_a = sin[angles + first], sin_b = sin[angles + second];
    const S cos_a = cos[angles + first], cos_b = cos[angles + second];
    T* to = out + head * args.head_dim;
    to[first] = narrow<T>(args.back ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
    to[second] = narrow<T>(args.back ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
  }
}

}  // namespace

namespace cuda {

const char* rotate_heads(const RotateHeads& args, void* stream) {
  if (args.heads == 0 || args.head_dim == 0) return nullptr;
  const char* error = nullptr;
  dispatch_dtype(args.dtype, [&](auto element) {
    error = launch(rotate_rows<decltype(element)>, blocks_for(args.views.token_rows, 1),
                   Traits::kThreads, 0, stream, args);
  });
  return error;
}

}  // namespace cuda
}  // namespace uhd
