// SPDX-License-Identifier: Apache-2.0
#include "window_attention/window_attention.h"

#include "common/glue.h"

#ifndef UHD_WITH_CUDA  // the CPU library alone defines the schemas
STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor views, SymInt window, "
      "SymInt num_windows, float scale, bool window_order) -> Tensor");
  m.def(
      "_window_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor views, "
      "SymInt window, SymInt num_windows, float scale, bool window_order) "
      "-> (Tensor, Tensor, Tensor)");
}
#endif

namespace uhd {
namespace {

// The stride of a dimension of size 1 may be anything; 0 is aligned.
TokenStrides strides_of(const Tensor& x) {
  return {x.size(0) == 1 ? 0 : x.stride(0), x.size(1) == 1 ? 0 : x.stride(1)};
}

// The tensor itself if kernels can read it, else a copy. Those for CUDA read 16 bytes at a time if
// the head size allows it, which also fixes the order of their sums: a tensor that lies between
// such boundaries is copied, so that no bit of a result depends on where an argument lies.
Tensor readable(const Tensor& any) {
  Tensor x = with_contiguous_rows(any);
#ifdef UHD_CUDA_KERNELS
  const int64_t pack = 16 / static_cast<int64_t>(x.element_size());
  if (x.dim() != 3 || x.size(2) % pack != 0) return x;
  const TokenStrides strides = strides_of(x);
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                       strides.token % pack == 0 && strides.head % pack == 0;
  if (!aligned) x = torch::stable::clone(x);
#endif
  return x;
}

void check(const Tensor& x, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
                      x.size(2) == q.size(2) && x.scalar_type() == q.scalar_type(),
                  "window_attention: ", name, " must be (N, H, D) like q");
}

WindowAttention arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& views,
                          int64_t window, int64_t num_windows, double scale, bool window_order) {
  WindowAttention args{};
  check(q, q, "q");
  check(k, q, "k");
  check(v, q, "v");
  args.views = view_table(views, window, q.size(0), num_windows);
  args.dtype = dtype_of(q, "q");
  args.heads = q.size(1);
  args.head_dim = q.size(2);
  args.scale = scale;
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_strides = strides_of(q);
  args.k_strides = strides_of(k);
  args.v_strides = strides_of(v);
  args.window_order = window_order;
  return args;
}

#ifndef UHD_CUDA_KERNELS

// Windows cost about the same; fewer than this many are not worth a second thread.
constexpr int64_t kLeastWindowsPerThread = 16;

// Tokens of the largest window that there is: an absurdly large window asks for no absurd memory.
int64_t largest_window(const ViewTable& views) {
  int64_t largest = 0;
  for (int64_t i = 0; i < views.num_views; ++i) {
    const ViewRow& view = views.rows[i];
    largest =
        std::max(largest, std::min(views.window, view.height) * std::min(views.window, view.width));
  }
  return largest;
}

template <class Kernel>
void run(const WindowAttention& args, const Tensor& like, Kernel&& kernel) {
  if (args.views.num_tokens() == 0 || args.heads == 0 || args.head_dim == 0) return;
  const int64_t each = window_attention_scratch(largest_window(args.views), args.head_dim);
  const bool wide = args.dtype == DType::kFloat64;
  Tensor scratch =
      new_empty(like, {max_chunks() * each}, wide ? ScalarType::Double : ScalarType::Float);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t bytes = each * static_cast<int64_t>(wide ? sizeof(double) : sizeof(float));
  parallel_chunks(args.views.num_windows(), kLeastWindowsPerThread,
                  [&](int64_t chunk, int64_t begin, int64_t end) {
                    kernel(begin, end, static_cast<void*>(base + chunk * bytes));
                  });
}

#endif

Tensor forward(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& views,
               int64_t window, int64_t num_windows, double scale, bool window_order) {
  const Tensor q = readable(q_any);
  const Tensor k = readable(k_any);
  const Tensor v = readable(v_any);
  WindowAttention args = arguments(q, k, v, views, window, num_windows, scale, window_order);
  Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  args.out = out.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  launch_on(q, cuda::window_attention_forward, args);
#else
  run(args, q, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_forward, args, begin, end, scratch);
  });
  zero_rows(out, args.views.num_tokens());
#endif
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out_any, const Tensor& q_any,
                                            const Tensor& k_any, const Tensor& v_any,
                                            const Tensor& views, int64_t window,
                                            int64_t num_windows, double scale, bool window_order) {
  const Tensor q = readable(q_any);
  const Tensor k = readable(k_any);
  const Tensor v = readable(v_any);
  const Tensor grad_out = readable(grad_out_any);
  WindowAttention args = arguments(q, k, v, views, window, num_windows, scale, window_order);
  check(grad_out, q, "grad_out");
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = strides_of(grad_out);
  Tensor grad_q = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_v = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
#ifdef UHD_CUDA_KERNELS
  const OnDevice guard(q);  // scratch and launch must choose their kernels by the same limits
  // Statistics of each row of the softmax, for the kernels that need two passes.
  const ScalarType wide =
      q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor scratch = new_empty(q, {cuda::window_attention_backward_scratch(args)}, wide);
  args.scratch = scratch.mutable_data_ptr();
  launch_on(q, cuda::window_attention_backward, args);
#else
  run(args, q, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_backward, args, begin, end, scratch);
  });
  for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) zero_rows(*grad, args.views.num_tokens());
#endif
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_attention", TORCH_BOX(&uhd::forward));
  m.impl("_window_attention_backward", TORCH_BOX(&uhd::backward));
}
