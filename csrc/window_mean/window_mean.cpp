// SPDX-License-Identifier: Apache-2.0
#include "window_mean/window_mean.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("window_mean(Tensor x, Tensor views, SymInt window, SymInt num_windows) -> Tensor");
  m.def(
      "_window_mean_backward(Tensor grad_out, Tensor views, SymInt window, SymInt num_tokens) -> "
      "Tensor");
}
#endif

namespace uhd {
namespace {

#ifndef UHD_CUDA_KERNELS
template <class Kernel>
void run(const WindowMean& args, size_t element_size, Kernel&& kernel) {
  const int64_t num_windows = args.views.num_windows();
  if (num_windows == 0 || args.channels == 0) return;
  const int64_t token_bytes = args.channels * static_cast<int64_t>(element_size);
  parallel_chunks(num_windows,
                  least_per_thread(args.views.num_tokens() / num_windows * token_bytes),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

Tensor forward(const Tensor& x_any, const Tensor& views, int64_t window, int64_t num_windows) {
  WindowMean args{};
  STD_TORCH_CHECK(x_any.dim() == 2, "window_mean: x must be (N, C)");
  args.views = view_table(views, window, x_any.size(0), num_windows);
  const Tensor x = with_contiguous_rows(x_any);
  args.dtype = dtype_of(x, "x");
  args.channels = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  Tensor out = new_empty(x, {num_windows, args.channels});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::window_mean_forward, args);
#else
  run(args, x.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_mean_forward, args, begin, end); });
  zero_rows(out, args.views.num_windows());
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, const Tensor& views, int64_t window,
                int64_t num_tokens) {
  WindowMean args{};
  STD_TORCH_CHECK(grad_out_any.dim() == 2, "window_mean: grad_out must be (M, C)");
  args.views = view_table(views, window, num_tokens, grad_out_any.size(0));
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  args.dtype = dtype_of(grad_out, "grad_out");
  args.channels = grad_out.size(1);
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_x = new_empty(grad_out, {num_tokens, args.channels});
  args.grad_x = grad_x.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::window_mean_backward, args);
#else
  run(args, grad_out.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_mean_backward, args, begin, end); });
  zero_rows(grad_x, args.views.num_tokens());
#endif
  return grad_x;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_mean", UHD_BOX(&uhd::forward));
  m.impl("_window_mean_backward", UHD_BOX(&uhd::backward));
}
