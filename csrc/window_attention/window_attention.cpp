// SPDX-License-Identifier: Apache-2.0
#include "window_attention/window_attention.h"

#include "common/glue.h"

STABLE_TORCH_LIBRARY_FRAGMENT(uhd_ops, m) {
#ifndef UHD_WITH_CUDA
  m.def(
      "window_attention(Tensor q, Tensor k, Tensor v, Tensor views, SymInt window, float scale, "
      "bool window_order) -> Tensor");
  m.def(
      "_window_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor views, "
      "SymInt window, float scale, bool window_order) -> (Tensor, Tensor, Tensor)");
#endif
}

namespace uhd {
namespace {

TokenStrides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1)}; }

void check(const Tensor& x, const Tensor& q, int64_t num_tokens, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == num_tokens && x.size(1) == q.size(1) &&
                      x.size(2) == q.size(2) && x.scalar_type() == q.scalar_type(),
                  "window_attention: ", name,
                  " must be (N, H, D) like q, with N the tokens of the views");
}

WindowAttention arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& views,
                          int64_t window, double scale, bool window_order) {
  WindowAttention args{};
  args.views = view_table(views, window);
  const int64_t num_tokens = args.views.num_tokens();
  check(q, q, num_tokens, "q");
  check(k, q, num_tokens, "k");
  check(v, q, num_tokens, "v");
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

Tensor forward(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& views,
               int64_t window, double scale, bool window_order) {
  const Tensor q = with_contiguous_rows(q_any);
  const Tensor k = with_contiguous_rows(k_any);
  const Tensor v = with_contiguous_rows(v_any);
  WindowAttention args = arguments(q, k, v, views, window, scale, window_order);
  Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  args.out = out.mutable_data_ptr();
  run(args, q, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_forward, args, begin, end, scratch);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out_any, const Tensor& q_any,
                                            const Tensor& k_any, const Tensor& v_any,
                                            const Tensor& views, int64_t window, double scale,
                                            bool window_order) {
  const Tensor q = with_contiguous_rows(q_any);
  const Tensor k = with_contiguous_rows(k_any);
  const Tensor v = with_contiguous_rows(v_any);
  const Tensor grad_out = with_contiguous_rows(grad_out_any);
  WindowAttention args = arguments(q, k, v, views, window, scale, window_order);
  check(grad_out, q, args.views.num_tokens(), "grad_out");
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = strides_of(grad_out);
  Tensor grad_q = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_v = new_empty(q, {q.size(0), q.size(1), q.size(2)});
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
  run(args, q, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_backward, args, begin, end, scratch);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_attention", TORCH_BOX(&uhd::forward));
  m.impl("_window_attention_backward", TORCH_BOX(&uhd::backward));
}
