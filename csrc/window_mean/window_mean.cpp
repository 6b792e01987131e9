// SPDX-License-Identifier: Apache-2.0
#include "window_mean/window_mean.h"

#include "common/glue.h"

STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
#ifndef UHD_WITH_CUDA
  m.def("window_mean(Tensor x, Tensor views, SymInt window, SymInt num_windows) -> Tensor");
  m.def(
      "_window_mean_backward(Tensor grad_out, Tensor views, SymInt window, SymInt num_tokens) -> "
      "Tensor");
#endif
}

namespace uhd {
namespace {

template <class Kernel>
void run(const WindowMean& args, size_t element_size, Kernel&& kernel) {
  const int64_t num_windows = args.views.num_windows();
  if (num_windows == 0 || args.channels == 0) return;
  const int64_t token_bytes = args.channels * static_cast<int64_t>(element_size);
  parallel_chunks(num_windows,
                  least_per_thread(args.views.num_tokens() / num_windows * token_bytes),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}

Tensor forward(const Tensor& x_any, const Tensor& views, int64_t window, int64_t num_windows) {
  WindowMean args{};
  args.views = view_table(views, window);
  STD_TORCH_CHECK(x_any.dim() == 2 && x_any.size(0) == args.views.num_tokens(),
                  "window_mean: x must be (N, C), with N the tokens of the views");
  STD_TORCH_CHECK(num_windows == args.views.num_windows(),
                  "window_mean: num_windows must be that of the views");
  const Tensor x = with_contiguous_rows(x_any);
  args.dtype = dtype_of(x, "x");
  args.channels = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  Tensor out = new_empty(x, {num_windows, args.channels});
  args.out = out.mutable_data_ptr();
  run(args, x.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_mean_forward, args, begin, end); });
  return out;
}

Tensor backward(const Tensor& grad_out_any, const Tensor& views, int64_t window,
                int64_t num_tokens) {
  WindowMean args{};
  args.views = view_table(views, window);
  STD_TORCH_CHECK(grad_out_any.dim() == 2 && grad_out_any.size(0) == args.views.num_windows(),
                  "window_mean: grad_out must be (M, C), with M the windows of the views");
  STD_TORCH_CHECK(num_tokens == args.views.num_tokens(),
                  "window_mean: num_tokens must be that of the views");
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  args.dtype = dtype_of(grad_out, "grad_out");
  args.channels = grad_out.size(1);
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_x = new_empty(grad_out, {num_tokens, args.channels});
  args.grad_x = grad_x.mutable_data_ptr();
  run(args, grad_out.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_mean_backward, args, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_mean", TORCH_BOX(&uhd::forward));
  m.impl("_window_mean_backward", TORCH_BOX(&uhd::backward));
}
