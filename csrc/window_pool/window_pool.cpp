// SPDX-License-Identifier: Apache-2.0
#include "window_pool/window_pool.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def(
      "window_pool(Tensor x, Tensor logits, Tensor views, SymInt window, SymInt num_windows) -> "
      "Tensor");
  m.def(
      "_window_pool_backward(Tensor grad_out, Tensor x, Tensor logits, Tensor views, "
      "SymInt window) -> (Tensor, Tensor)");
}
#endif

namespace uhd {
namespace {

WindowPool arguments(const Tensor& x, const Tensor& logits, const Tensor& views, int64_t window,
                     int64_t num_windows) {
  WindowPool args{};
  STD_TORCH_CHECK(x.dim() == 2, "window_pool: x must be (N, C)");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == x.size(0) && logits.size(1) == x.size(1) &&
                      logits.scalar_type() == x.scalar_type(),
                  "window_pool: logits must be (N, C) like x");
  args.views = view_table(views, window, x.size(0), num_windows);
  args.dtype = dtype_of(x, "x");
  args.channels = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  return args;
}

#ifndef UHD_CUDA_KERNELS
template <class Kernel>
void run(const WindowPool& args, size_t element_size, Kernel&& kernel) {
  const int64_t num_windows = args.views.num_windows();
  if (num_windows == 0 || args.channels == 0) return;
  const int64_t token_bytes = 2 * args.channels * static_cast<int64_t>(element_size);
  parallel_chunks(num_windows,
                  least_per_thread(args.views.num_tokens() / num_windows * token_bytes),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

Tensor forward(const Tensor& x_any, const Tensor& logits_any, const Tensor& views, int64_t window,
               int64_t num_windows) {
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor logits = with_contiguous_rows(logits_any);
  WindowPool args = arguments(x, logits, views, window, num_windows);
  Tensor out = new_empty(x, {num_windows, args.channels});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::window_pool_forward, args);
#else
  run(args, x.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_pool_forward, args, begin, end); });
  zero_rows(out, args.views.num_windows());
#endif
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out_any, const Tensor& x_any,
                                    const Tensor& logits_any, const Tensor& views, int64_t window) {
  const Tensor x = with_contiguous_rows(x_any);
  const Tensor logits = with_contiguous_rows(logits_any);
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  WindowPool args = arguments(x, logits, views, window, grad_out.size(0));
  STD_TORCH_CHECK(grad_out.dim() == 2 && grad_out.size(1) == args.channels &&
                      grad_out.scalar_type() == x.scalar_type(),
                  "window_pool: grad_out must be (M, C) like x");
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_x = new_empty(x, {x.size(0), args.channels});
  Tensor grad_logits = new_empty(x, {x.size(0), args.channels});
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_logits = grad_logits.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::window_pool_backward, args);
#else
  run(args, x.element_size(),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(window_pool_backward, args, begin, end); });
  for (Tensor* grad : {&grad_x, &grad_logits}) zero_rows(*grad, args.views.num_tokens());
#endif
  return {grad_x, grad_logits};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_pool", UHD_BOX(&uhd::forward));
  m.impl("_window_pool_backward", UHD_BOX(&uhd::backward));
}
