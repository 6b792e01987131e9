// SPDX-License-Identifier: Apache-2.0
#include "pixel_unshuffle/pixel_unshuffle.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def("pixel_unshuffle(Tensor x, Tensor views, SymInt factor, SymInt num_windows) -> Tensor");
  m.def(
      "_pixel_unshuffle_backward(Tensor grad_out, Tensor views, SymInt factor, SymInt num_tokens) "
      "-> Tensor");
}
#endif

namespace uhd {
namespace {

#ifndef UHD_CUDA_KERNELS
template <class Kernel>
void run(const PixelUnshuffle& args, int64_t num_windows, int64_t window_bytes, Kernel&& kernel) {
  if (num_windows == 0 || args.channels == 0) return;
  parallel_chunks(num_windows, least_per_thread(window_bytes),
                  [&](int64_t, int64_t begin, int64_t end) { kernel(begin, end); });
}
#endif

Tensor forward(const Tensor& x_any, const Tensor& views, int64_t factor, int64_t num_windows) {
  PixelUnshuffle args{};
  STD_TORCH_CHECK(x_any.dim() == 2, "pixel_unshuffle: x must be (N, C)");
  args.views = view_table(views, factor, x_any.size(0), num_windows);
  const Tensor x = with_contiguous_rows(x_any);
  args.dtype = dtype_of(x, "x");
  args.channels = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  const int64_t merged = checked_product(checked_product(factor, factor), args.channels);
  Tensor out = new_empty(x, {num_windows, merged});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::pixel_unshuffle_forward, args);
#else
  run(args, args.views.num_windows(), merged * static_cast<int64_t>(x.element_size()),
      [&](int64_t begin, int64_t end) { UHD_CALL_ISA(pixel_unshuffle_forward, args, begin, end); });
  zero_rows(out, args.views.num_windows());
#endif
  return out;
}

Tensor backward(const Tensor& grad_out_any, const Tensor& views, int64_t factor,
                int64_t num_tokens) {
  PixelUnshuffle args{};
  const int64_t slots = checked_product(factor, factor);
  STD_TORCH_CHECK(grad_out_any.dim() == 2 && slots > 0 && grad_out_any.size(1) % slots == 0,
                  "pixel_unshuffle: grad_out must be (M, f*f*C)");
  args.views = view_table(views, factor, num_tokens, grad_out_any.size(0));
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  args.dtype = dtype_of(grad_out, "grad_out");
  args.channels = grad_out.size(1) / slots;
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_stride = grad_out.stride(0);
  Tensor grad_x = new_empty(grad_out, {num_tokens, args.channels});
  args.grad_x = grad_x.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(grad_out, cuda::pixel_unshuffle_backward, args);
#else
  run(args, args.views.num_windows(),
      grad_out.size(1) * static_cast<int64_t>(grad_out.element_size()),
      [&](int64_t begin, int64_t end) {
        UHD_CALL_ISA(pixel_unshuffle_backward, args, begin, end);
      });
  zero_rows(grad_x, args.views.num_tokens());
#endif
  return grad_x;
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("pixel_unshuffle", UHD_BOX(&uhd::forward));
  m.impl("_pixel_unshuffle_backward", UHD_BOX(&uhd::backward));
}
