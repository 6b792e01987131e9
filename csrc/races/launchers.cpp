// SPDX-License-Identifier: Apache-2.0
// The CPU kernels on several threads, behind the names of the launchers for CUDA: so the driver
// takes them through its cases, and ThreadSanitizer watches. Each does what the glue of its
// operator does, except with threads of its own: those of torch are not instrumented.
#include <cstring>
#include <stdexcept>
#include <string>

#include "linear_activation/linear_activation.h"
#include "pixel_unshuffle/pixel_unshuffle.h"
#include "races/threads.h"
#include "tile_weight/tile_weight.h"
#include "unshuffle_norm/unshuffle_norm.h"
#include "window_attention/window_attention.h"
#include "window_mean/window_mean.h"
#include "window_pool/window_pool.h"

namespace uhd {

// In the library's common/isa.cpp this needs torch.
Isa active_isa() {
  static const Isa isa = [] {
    const char* wish = std::getenv("UHD_OPS_CPU_ISA");
    const std::string name = wish ? wish : "scalar";
    if (name == "scalar") return Isa::kScalar;
    if (name == "avx2") return Isa::kAvx2;
    if (name == "avx512") return Isa::kAvx512;
    throw std::runtime_error("UHD_OPS_CPU_ISA must be scalar, avx2 or avx512, got " + name);
  }();
  return isa;
}

namespace cuda {
namespace {

// The rows [begin, end) of a tensor, or of some columns of it, which are padding.
void zero_rows(void* first, int64_t begin, int64_t end, int64_t stride, int64_t width,
               DType dtype) {
  for (int64_t row = begin; first != nullptr && row < end; ++row) {
    std::memset(static_cast<char*>(first) + row * stride * element_size(dtype), 0,
                static_cast<size_t>(width * element_size(dtype)));
  }
}
void zero_tokens(void* first, const ViewTable& views, int64_t width, DType dtype) {
  zero_rows(first, views.num_tokens(), views.token_rows, width, width, dtype);
}
void zero_windows(void* first, const ViewTable& views, int64_t width, DType dtype) {
  zero_rows(first, views.num_windows(), views.window_rows, width, width, dtype);
}

constexpr DType wide(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace

#define UHD_ON_THREADS(function, total)                                     \
  races::share(#function, total, [&](int64_t, int64_t begin, int64_t end) { \
    UHD_CALL_ISA(function, args, begin, end);                               \
  })

const char* window_mean_forward(const WindowMean& args, void*) {
  UHD_ON_THREADS(window_mean_forward, args.views.num_windows());
  zero_windows(args.out, args.views, args.channels, args.dtype);
  return nullptr;
}

const char* window_mean_backward(const WindowMean& args, void*) {
  UHD_ON_THREADS(window_mean_backward, args.views.num_windows());
  zero_tokens(args.grad_x, args.views, args.channels, args.dtype);
  return nullptr;
}

const char* window_pool_forward(const WindowPool& args, void*) {
  UHD_ON_THREADS(window_pool_forward, args.views.num_windows());
  zero_windows(args.out, args.views, args.channels, args.dtype);
  return nullptr;
}

const char* window_pool_backward(const WindowPool& args, void*) {
  UHD_ON_THREADS(window_pool_backward, args.views.num_windows());
  zero_tokens(args.grad_x, args.views, args.channels, args.dtype);
  zero_tokens(args.grad_logits, args.views, args.channels, args.dtype);
  return nullptr;
}

const char* pixel_unshuffle_forward(const PixelUnshuffle& args, void*) {
  const int64_t merged = args.views.window * args.views.window * args.channels;
  UHD_ON_THREADS(pixel_unshuffle_forward, args.views.num_windows());
  zero_windows(args.out, args.views, merged, args.dtype);
  return nullptr;
}

const char* pixel_unshuffle_backward(const PixelUnshuffle& args, void*) {
  UHD_ON_THREADS(pixel_unshuffle_backward, args.views.num_windows());
  zero_tokens(args.grad_x, args.views, args.channels, args.dtype);
  return nullptr;
}

int64_t unshuffle_norm_blocks(const UnshuffleNorm& args) {
  return ceil_div(args.views.num_windows(), kWindowsPerBlock);
}

const char* unshuffle_norm_forward(const UnshuffleNorm& args, void*) {
  UHD_ON_THREADS(unshuffle_norm_forward, args.views.num_windows());
  zero_windows(args.z, args.views, args.merged_channels(), args.dtype);
  zero_windows(args.residual, args.views, args.channels, args.dtype);
  zero_windows(args.mean, args.views, 1, wide(args.dtype));
  zero_windows(args.rstd, args.views, 1, wide(args.dtype));
  return nullptr;
}

const char* unshuffle_norm_backward(const UnshuffleNorm& args, void*) {
  UHD_ON_THREADS(unshuffle_norm_backward, unshuffle_norm_blocks(args));
  if (args.partials) UHD_ON_THREADS(unshuffle_norm_sum_partials, args.merged_channels());
  zero_tokens(args.grad_x, args.views, args.channels, args.dtype);
  return nullptr;
}

const char* linear_activation_forward(const LinearActivation& args, void*) {
  UHD_ON_THREADS(linear_activation_forward, args.rows);
  return nullptr;
}

const char* linear_activation_backward(const LinearActivation& args, void*) {
  UHD_ON_THREADS(linear_activation_backward, args.blocks());
  if (args.partials) UHD_ON_THREADS(linear_activation_sum_partials, args.width);
  return nullptr;
}

const char* tile_weight_forward(const TileWeight& args, void*) {
  UHD_ON_THREADS(tile_weight_forward, args.out_rows());
  return nullptr;
}

const char* tile_weight_backward(const TileWeight& args, void*) {
  UHD_ON_THREADS(tile_weight_backward, args.rows * args.cols);
  return nullptr;
}

namespace {

// The scratch memory of all threads is one piece, as in the library: a thread that went beyond its
// own would meet another.
template <class Kernel>
void share_windows(const char* function, const WindowAttention& args, Kernel&& kernel) {
  const int64_t each = window_attention_scratch(args, args.views.window * args.views.window) *
                       element_size(wide(args.dtype));
  std::vector<char> scratch(static_cast<size_t>(races::num_threads * each));
  races::share(function, args.views.num_windows(), [&](int64_t thread, int64_t begin, int64_t end) {
    kernel(begin, end, static_cast<void*>(scratch.data() + thread * each));
  });
}

}  // namespace

int64_t window_attention_backward_scratch(const WindowAttention&) { return 0; }

const char* window_attention_forward(const WindowAttention& args, void*) {
  share_windows("window_attention_forward", args, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_forward, args, begin, end, scratch);
  });
  zero_tokens(args.out, args.views, args.out_stride, args.dtype);
  return nullptr;
}

const char* window_attention_backward(const WindowAttention& args, void*) {
  share_windows("window_attention_backward", args, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_backward, args, begin, end, scratch);
  });
  const int64_t width = args.heads * args.head_dim, kv_width = args.kv_heads * args.head_dim;
  const int64_t begin = args.views.num_tokens(), end = args.views.token_rows;
  zero_rows(args.grad_q, begin, end, args.grad_q_stride, width, args.dtype);
  zero_rows(args.grad_k, begin, end, args.grad_kv_stride, kv_width, args.dtype);
  zero_rows(args.grad_v, begin, end, args.grad_kv_stride, kv_width, args.dtype);
  return nullptr;
}

}  // namespace cuda
}  // namespace uhd
