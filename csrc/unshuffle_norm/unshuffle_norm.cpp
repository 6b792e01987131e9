// SPDX-License-Identifier: Apache-2.0
#include "unshuffle_norm/unshuffle_norm.h"

#include <optional>

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def(
      "_unshuffle_norm(Tensor x, Tensor views, SymInt num_windows, Tensor? norm_weight, "
      "Tensor? norm_bias, float eps, SymInt factor, bool residual) "
      "-> (Tensor z, Tensor residual_mean, Tensor mean, Tensor rstd)");
  m.def(
      "_unshuffle_norm_backward(Tensor grad_z, Tensor? grad_residual, Tensor x, Tensor views, "
      "Tensor? norm_weight, Tensor mean, Tensor rstd, SymInt factor, bool affine) "
      "-> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias)");
}
#endif

namespace uhd {
namespace {

ScalarType wide_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_vector(const Tensor& vector, const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.is_contiguous() &&
                      vector.scalar_type() == wide_of(x),
                  "unshuffle_norm: ", name, " must be contiguous, (", size,
                  ",), and float64 for float64 x, else float32");
}

UnshuffleNorm arguments(const Tensor& x, const Tensor& views, int64_t factor, int64_t num_windows,
                        const std::optional<Tensor>& norm_weight) {
  UnshuffleNorm args{};
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) >= 1, "unshuffle_norm: x must be (N, C), C >= 1");
  args.views = view_table(views, factor, x.size(0), num_windows);
  args.dtype = dtype_of(x, "x");
  args.channels = x.size(1);
  args.x = x.const_data_ptr();
  args.x_stride = x.stride(0);
  checked_product(checked_product(factor, factor), args.channels);
  if (norm_weight) {
    check_vector(*norm_weight, x, args.merged_channels(), "norm_weight");
    args.norm_weight = norm_weight->const_data_ptr();
  }
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x_any, const Tensor& views,
                                                   int64_t num_windows,
                                                   std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> norm_bias, double eps,
                                                   int64_t factor, bool residual) {
  const Tensor x = with_contiguous_rows(x_any);
  UnshuffleNorm args = arguments(x, views, factor, num_windows, norm_weight);
  if (norm_bias) {
    check_vector(*norm_bias, x, args.merged_channels(), "norm_bias");
    args.norm_bias = norm_bias->const_data_ptr();
  }
  args.eps = eps;
  Tensor z = new_empty(x, {num_windows, args.merged_channels()});
  Tensor residual_mean = new_empty(x, {residual ? num_windows : 0, args.channels});
  Tensor mean = new_empty(x, {num_windows}, wide_of(x));
  Tensor rstd = new_empty(x, {num_windows}, wide_of(x));
  args.z = z.mutable_data_ptr();
  args.residual = residual ? residual_mean.mutable_data_ptr() : nullptr;
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::unshuffle_norm_forward, args);
#else
  const int64_t bytes = args.merged_channels() * static_cast<int64_t>(x.element_size());
  const int64_t real = args.views.num_windows();
  parallel_chunks(real, least_per_thread(bytes), [&](int64_t, int64_t begin, int64_t end) {
    UHD_CALL_ISA(unshuffle_norm_forward, args, begin, end);
  });
  for (Tensor* out : {&z, &residual_mean, &mean, &rstd}) zero_rows(*out, real);
#endif
  return {z, residual_mean, mean, rstd};
}

// The gradients of norm_weight and norm_bias are empty unless `affine`.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_z_any,
                                            std::optional<Tensor> grad_residual,
                                            const Tensor& x_any, const Tensor& views,
                                            std::optional<Tensor> norm_weight, const Tensor& mean,
                                            const Tensor& rstd, int64_t factor, bool affine) {
  const Tensor x = with_contiguous_rows(x_any), grad_z = with_contiguous_rows(grad_z_any);
  const int64_t windows = grad_z.size(0);
  UnshuffleNorm args = arguments(x, views, factor, windows, norm_weight);
  const int64_t merged = args.merged_channels();
  STD_TORCH_CHECK(
      grad_z.dim() == 2 && grad_z.size(1) == merged && grad_z.scalar_type() == x.scalar_type(),
      "unshuffle_norm: grad_z must be (M, f*f*C) in the dtype of x");
  check_vector(mean, x, windows, "mean");
  check_vector(rstd, x, windows, "rstd");
  args.grad_z = grad_z.const_data_ptr();
  args.grad_z_stride = grad_z.stride(0);
  if (grad_residual) {
    STD_TORCH_CHECK(grad_residual->dim() == 2 && grad_residual->size(0) == windows &&
                        grad_residual->size(1) == args.channels &&
                        grad_residual->scalar_type() == x.scalar_type(),
                    "unshuffle_norm: grad_residual must be (M, C) in the dtype of x");
    grad_residual = with_contiguous_rows(*grad_residual);
    args.grad_residual = grad_residual->const_data_ptr();
    args.grad_residual_stride = grad_residual->stride(0);
  }
  args.mean = const_cast<void*>(mean.const_data_ptr());
  args.rstd = const_cast<void*>(rstd.const_data_ptr());
#ifdef UHD_CUDA_KERNELS
  const int64_t blocks = cuda::unshuffle_norm_blocks(args);
#else
  const int64_t real = args.views.num_windows();
  const int64_t blocks = (real + kWindowsPerBlock - 1) / kWindowsPerBlock;
#endif
  Tensor grad_x = new_empty(x, {x.size(0), x.size(1)});
  Tensor grad_norm_weight = new_empty(x, {affine ? merged : 0}, wide_of(x));
  Tensor grad_norm_bias = new_empty(x, {affine ? merged : 0}, wide_of(x));
  Tensor partials = new_empty(x, {affine ? blocks : 0, 2 * merged}, wide_of(x));
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_norm_weight = grad_norm_weight.mutable_data_ptr();
  args.grad_norm_bias = grad_norm_bias.mutable_data_ptr();
  args.partials = affine ? partials.mutable_data_ptr() : nullptr;
#ifdef UHD_CUDA_KERNELS
  launch_on(x, cuda::unshuffle_norm_backward, args);
#else
  parallel_chunks(blocks, 1, [&](int64_t, int64_t begin, int64_t end) {
    UHD_CALL_ISA(unshuffle_norm_backward, args, begin, end);
  });
  if (affine) {
    parallel_chunks(merged, least_per_thread(blocks * 8), [&](int64_t, int64_t begin, int64_t end) {
      UHD_CALL_ISA(unshuffle_norm_sum_partials, args, begin, end);
    });
  }
  zero_rows(grad_x, args.views.num_tokens());
#endif
  return {grad_x, grad_norm_weight, grad_norm_bias};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("_unshuffle_norm", UHD_BOX(&uhd::forward));
  m.impl("_unshuffle_norm_backward", UHD_BOX(&uhd::backward));
}
