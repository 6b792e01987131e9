// SPDX-License-Identifier: Apache-2.0
#include "linear_activation/linear_activation.h"

#include <array>
#include <optional>

#include "common/glue.h"

STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
#ifndef UHD_WITH_CUDA
  m.def(
      "_linear_activation(Tensor z, Tensor weight, Tensor? bias, str activation, SymInt group, "
      "bool save_products) -> (Tensor h, Tensor u)");
  m.def(
      "_linear_activation_backward(Tensor grad_h, Tensor u, Tensor? bias, str activation, "
      "SymInt group, bool grad_bias) -> (Tensor grad_u, Tensor grad_bias)");
#endif
}

namespace uhd {
namespace {

constexpr const char* kNames[] = {"gelu_tanh", "gelu", "quick_gelu", "silu", "relu"};

Activation parse(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, "linear_activation: unknown activation ", name);
}

LinearActivation arguments(const Tensor& like, const std::optional<Tensor>& bias, int64_t width,
                           const std::string& activation, int64_t group) {
  STD_TORCH_CHECK(group >= 1, "linear_activation: group must be at least 1, got ", group);
  LinearActivation args{};
  args.dtype = dtype_of(like, "z");
  args.activation = parse(activation);
  args.width = width;
  args.group = group;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == width && bias->is_contiguous() &&
                        bias->scalar_type() == like.scalar_type(),
                    "linear_activation: bias must be contiguous, (", width,
                    ",), in the dtype of z");
    args.bias = bias->const_data_ptr();
  }
  return args;
}

// out = a b, the product on torch's library for matrices. out is overwritten in place.
void matmul_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returned
}

// Without gradients the products of this many rows share one buffer. Smaller blocks cost more than
// the cache gives back, because the GEMM repacks the weight for every block: fc1 of 4900 x 1152 by
// 4304 x 1152 takes 696 ms in blocks of 256 rows, 548 ms in blocks of 1024 and 464 ms at once in
// float32, and 160, 159 and 122 ms in bfloat16 (2 threads of a busy Xeon with AMX). At this size a
// dense fc1 over the 1225 windows of a 70 x 70 grid is one GEMM.
constexpr int64_t kRowsPerBlock = 2048;

// h = mean over groups of rows of activation(z weight^T + bias); u holds the products z weight^T of
// all rows if `save_products`, else it is empty.
std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& weight,
                                   std::optional<Tensor> bias, std::string activation,
                                   int64_t group, bool save_products) {
  STD_TORCH_CHECK(z.dim() == 2 && weight.dim() == 2 && z.size(1) == weight.size(1) &&
                      z.scalar_type() == weight.scalar_type(),
                  "linear_activation: z (R, I) and weight (O, I) do not fit");
  const int64_t rows = z.size(0), width = weight.size(0);
  LinearActivation args = arguments(z, bias, width, activation, group);
  STD_TORCH_CHECK(rows % group == 0, "linear_activation: group must divide the rows of z");
  const int64_t step = std::min(rows, std::max<int64_t>(1, kRowsPerBlock / group) * group);
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  Tensor h = new_empty(z, {rows / group, width});
  Tensor u = new_empty(z, {save_products ? rows : 0, width});
  Tensor reused = new_empty(z, {save_products ? 0 : step, width});
  const int64_t bytes = group * width * static_cast<int64_t>(z.element_size());
  for (int64_t begin = 0; begin < rows && width; begin += step) {
    Tensor z_rows = z, all = save_products ? u : reused;
    const int64_t count = std::min(step, rows - begin);
    z_rows = torch::stable::narrow(z_rows, 0, begin, count);
    const Tensor products = torch::stable::narrow(all, 0, save_products ? begin : 0, count);
    matmul_into(products, z_rows, transposed);
    args.u = products.const_data_ptr();
    args.h = static_cast<char*>(h.mutable_data_ptr()) +
             begin / group * width * static_cast<int64_t>(h.element_size());
    parallel_chunks(count / group, least_per_thread(bytes),
                    [&](int64_t, int64_t first, int64_t last) {
                      UHD_CALL_ISA(linear_activation_forward, args, first, last);
                    });
  }
  return {h, u};
}

// Gradients of the products, (R, O), and of the bias, (O,) in float64 for float64, else float32;
// empty unless `grad_bias`.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_h_any, const Tensor& u_any,
                                    std::optional<Tensor> bias, std::string activation,
                                    int64_t group, bool grad_bias) {
  const Tensor grad_h = with_contiguous_rows(grad_h_any), u = torch::stable::contiguous(u_any);
  STD_TORCH_CHECK(u.dim() == 2 && grad_h.dim() == 2 && grad_h.size(1) == u.size(1) &&
                      grad_h.size(0) * group == u.size(0) &&
                      grad_h.scalar_type() == u.scalar_type(),
                  "linear_activation: grad_h (R / group, O) and u (R, O) do not fit");
  LinearActivation args = arguments(u, bias, u.size(1), activation, group);
  args.u = u.const_data_ptr();
  args.grad_h = grad_h.const_data_ptr();
  args.grad_h_stride = grad_h.stride(0);
  args.rows = grad_h.size(0);
  const ScalarType wide =
      u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_u = new_empty(u, {u.size(0), args.width});
  Tensor sums = new_empty(u, {grad_bias ? args.width : 0}, wide);
  Tensor partials = new_empty(u, {grad_bias ? args.blocks() : 0, args.width}, wide);
  args.grad_u = grad_u.mutable_data_ptr();
  args.grad_bias = sums.mutable_data_ptr();
  args.partials = grad_bias ? partials.mutable_data_ptr() : nullptr;
  parallel_chunks(args.blocks(), 1, [&](int64_t, int64_t begin, int64_t end) {
    UHD_CALL_ISA(linear_activation_backward, args, begin, end);
  });
  if (grad_bias) {
    parallel_chunks(args.width, least_per_thread(args.blocks() * 4),
                    [&](int64_t, int64_t begin, int64_t end) {
                      UHD_CALL_ISA(linear_activation_sum_partials, args, begin, end);
                    });
  }
  return {grad_u, sums};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("_linear_activation", TORCH_BOX(&uhd::forward));
  m.impl("_linear_activation_backward", TORCH_BOX(&uhd::backward));
}
