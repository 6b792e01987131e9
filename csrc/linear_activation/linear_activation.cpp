// SPDX-License-Identifier: Apache-2.0
#include "linear_activation/linear_activation.h"

#include <array>
#include <optional>

#include "common/glue.h"
#include "linear_activation/cublaslt.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def(
      "_linear_activation(Tensor z, Tensor weight, Tensor? bias, str activation, SymInt group, "
      "bool save_products, bool fused) -> (Tensor h, Tensor u)");
  m.def(
      "_linear_activation_backward(Tensor grad_h, Tensor u, Tensor? bias, str activation, "
      "SymInt group, bool grad_bias) -> (Tensor grad_u, Tensor grad_bias)");
}
#endif

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

// out = a weight^T + bias on torch's library for matrices. out is overwritten in place.
void linear_into(const Tensor& out, const Tensor& a, const Tensor& weight,
                 const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(weight),
      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that the call returned
}

// So many rows from `begin` on; the tensor itself where those are all, as in most calls.
Tensor rows_of(Tensor x, int64_t begin, int64_t count) {
  return count == x.size(0) ? x : torch::stable::narrow(x, 0, begin, count);
}

// Without gradients the products of this many rows share one buffer.
#ifdef UHD_CUDA_KERNELS
// Here the block bounds the memory only, 141 MB for 4304 outputs in bfloat16. The GEMM of a block
// is more than ten waves of 128 x 256 tiles on 132 SMs, so that cutting it costs a few percent of
// its time at most, in its last wave (computed, not measured). Blocks that fit into the second
// cache, to read the products from there, would be short GEMMs: 4 waves, of which the last is
// nearly empty.
constexpr int64_t kRowsPerBlock = 16384;
#else
// Smaller blocks cost more than the cache gives back, because the GEMM repacks the weight for every
// block: fc1 of 4900 x 1152 by 4304 x 1152 takes 696 ms in blocks of 256 rows, 548 ms in blocks of
// 1024 and 464 ms at once in float32, and 160, 159 and 122 ms in bfloat16 (2 threads of a busy Xeon
// with AMX). At this size a dense fc1 over the 1225 windows of a 70 x 70 grid is one GEMM.
constexpr int64_t kRowsPerBlock = 2048;
#endif

// Block by block, u = z weight^T + bias by torch, then h by our kernel, which adds the bias of
// `args` if there is one. An empty u is not kept.
void forward_in_blocks(LinearActivation args, const Tensor& z, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Tensor& h, const Tensor& u) {
  const int64_t rows = z.size(0), bytes = args.width * static_cast<int64_t>(z.element_size());
  const int64_t step =
      std::min(rows, std::max<int64_t>(1, kRowsPerBlock / args.group) * args.group);
  const bool keep = u.numel() > 0;
  Tensor products = keep ? u : new_empty(z, {step, args.width});
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    const Tensor block = rows_of(products, keep ? begin : 0, count);
    linear_into(block, rows_of(z, begin, count), weight, bias);
    args.u = block.const_data_ptr();
    args.h = static_cast<char*>(h.mutable_data_ptr()) + begin / args.group * bytes;
#ifdef UHD_CUDA_KERNELS
    args.rows = count / args.group;
    launch_on(h, cuda::linear_activation_forward, args);
#else
    parallel_chunks(count / args.group, least_per_thread(args.group * bytes),
                    [&](int64_t, int64_t first, int64_t last) {
                      UHD_CALL_ISA(linear_activation_forward, args, first, last);
                    });
#endif
  }
}

// h = mean over groups of rows of activation(z weight^T + bias). If `save_products`, u holds the
// products of all rows, else it is empty. With `fused`, bias and activation may run in the epilogue
// of the product; u then includes the bias, whoever computes it, and is rounded after it.
std::tuple<Tensor, Tensor> forward(const Tensor& z, const Tensor& weight,
                                   std::optional<Tensor> bias, std::string activation,
                                   int64_t group, bool save_products, bool fused) {
  STD_TORCH_CHECK(z.dim() == 2 && weight.dim() == 2 && z.size(1) == weight.size(1) &&
                      z.scalar_type() == weight.scalar_type(),
                  "linear_activation: z (R, I) and weight (O, I) do not fit");
  const int64_t rows = z.size(0), width = weight.size(0);
#ifdef UHD_CUDA_KERNELS
  // Neighbours share a reciprocal where 16 bytes are read at once. A bias that lies between such
  // boundaries is copied, so that no bit of a result depends on where an argument lies.
  if (bias && reinterpret_cast<uintptr_t>(bias->const_data_ptr()) % 16 != 0) {
    bias = torch::stable::clone(*bias);
  }
#endif
  LinearActivation args = arguments(z, bias, width, activation, group);
  STD_TORCH_CHECK(rows % group == 0, "linear_activation: group must divide the rows of z");
  Tensor h = new_empty(z, {rows / group, width});
  Tensor u = new_empty(z, {save_products ? rows : 0, width});
  if (rows == 0 || width == 0) return {h, u};
  if (!fused) {
    forward_in_blocks(args, z, weight, std::nullopt, h, u);
    return {h, u};
  }
  // cuBLASLt has the GELU in its tanh form only. Not for groups: it would write the activation of
  // every row, where our kernel writes their mean, 1 / group of the bytes.
  if (args.activation == Activation::kGeluTanh && group == 1 &&
      cublaslt::linear_gelu(z, weight, bias, h, u)) {
    return {h, u};
  }
  args.bias = nullptr;
  forward_in_blocks(args, z, weight, bias, h, u);
  return {h, u};
}

// Gradients of the products, (R, O), and of the bias, (O,) in float64 for float64, else float32;
// empty unless `grad_bias`.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_h_any, const Tensor& u_any,
                                    std::optional<Tensor> bias, std::string activation,
                                    int64_t group, bool grad_bias) {
  const Tensor grad_h = with_contiguous_rows(grad_h_any), u = torch::stable::contiguous(u_any);
  STD_TORCH_CHECK(u.dim() == 2 && grad_h.dim() == 2 && grad_h.size(1) == u.size(1) &&
                      checked_product(grad_h.size(0), group) == u.size(0) &&
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
  args.grad_bias = grad_bias ? sums.mutable_data_ptr() : nullptr;
  args.partials = grad_bias ? partials.mutable_data_ptr() : nullptr;
#ifdef UHD_CUDA_KERNELS
  launch_on(u, cuda::linear_activation_backward, args);
#else
  parallel_chunks(args.blocks(), 1, [&](int64_t, int64_t begin, int64_t end) {
    UHD_CALL_ISA(linear_activation_backward, args, begin, end);
  });
  if (grad_bias) {
    parallel_chunks(args.width, least_per_thread(args.blocks() * 4),
                    [&](int64_t, int64_t begin, int64_t end) {
                      UHD_CALL_ISA(linear_activation_sum_partials, args, begin, end);
                    });
  }
#endif
  return {grad_u, sums};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("_linear_activation", UHD_BOX(&uhd::forward));
  m.impl("_linear_activation_backward", UHD_BOX(&uhd::backward));
}
