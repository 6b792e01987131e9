// SPDX-License-Identifier: Apache-2.0
#include "window_attention/window_attention.h"

#include <optional>

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
  m.def(
      "window_attention_qkvpacked(Tensor qkv, SymInt num_heads, Tensor views, SymInt window, "
      "SymInt num_windows, float scale, bool window_order) -> Tensor");
  m.def(
      "_window_attention_qkvpacked_backward(Tensor grad_out, Tensor qkv, SymInt num_heads, "
      "Tensor views, SymInt window, SymInt num_windows, float scale, bool window_order) -> Tensor");
  m.def(
      "_window_attention_rotary(Tensor q, Tensor? k, Tensor? v, SymInt num_heads, Tensor cos, "
      "Tensor sin, SymInt parts, Tensor views, SymInt window, SymInt num_windows, float scale, "
      "bool window_order) -> Tensor");
  m.def(
      "_window_attention_rotary_backward(Tensor grad_out, Tensor q, Tensor? k, Tensor? v, "
      "SymInt num_heads, Tensor cos, Tensor sin, SymInt parts, Tensor views, SymInt window, "
      "SymInt num_windows, float scale, bool window_order) -> (Tensor, Tensor, Tensor)");
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

// The elements of a tensor from one of its heads on.
void* from_head(void* data, const Tensor& x, int64_t head, int64_t head_stride) {
  return static_cast<char*>(data) + head * head_stride * static_cast<int64_t>(x.element_size());
}
const void* from_head(const Tensor& x, int64_t head) {
  return from_head(const_cast<void*>(x.const_data_ptr()), x, head, strides_of(x).head);
}

// What q, k and v have in common; `like` is one of them, or holds all three.
WindowAttention sizes(const Tensor& like, int64_t heads, int64_t kv_heads, const Tensor& views,
                      int64_t window, int64_t num_windows, double scale, bool window_order) {
  STD_TORCH_CHECK(like.dim() == 3, "window_attention: tensors must be (N, H, D)");
  STD_TORCH_CHECK(heads >= 0 && kv_heads >= 0 &&
                      (heads == kv_heads || (heads > 0 && kv_heads > 0 && heads % kv_heads == 0)),
                  "window_attention: ", heads, " heads of q cannot share ", kv_heads,
                  " heads of k and v");
  WindowAttention args{};
  args.views = view_table(views, window, like.size(0), num_windows);
  args.dtype = dtype_of(like, "q");
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.group = kv_heads == 0 ? 1 : heads / kv_heads;
  args.head_dim = like.size(2);
  args.scale = scale;
  args.window_order = window_order;
  return args;
}

void check(const Tensor& x, const Tensor& like, int64_t heads, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(1) == heads &&
                      x.size(2) == like.size(2) && x.scalar_type() == like.scalar_type(),
                  "window_attention: ", name, " does not fit q");
}

// The arguments of a call, and the tensors that they point into.
struct Separate {
  Tensor q, k, v;
  WindowAttention args;

  template <class... Rest>
  Separate(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, Rest... rest)
      : q(readable(q_any)), k(readable(k_any)), v(readable(v_any)) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "window_attention: q and k must be (N, H, D)");
    args = sizes(q, q.size(1), k.size(1), rest...);
    check(k, q, args.kv_heads, "k");
    check(v, q, args.kv_heads, "v");
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.v = v.const_data_ptr();
    args.q_strides = strides_of(q);
    args.k_strides = strides_of(k);
    args.v_strides = strides_of(v);
  }
};

struct Packed {
  Tensor qkv;  // (N, H + 2 H_kv, D)
  WindowAttention args;

  template <class... Rest>
  Packed(const Tensor& qkv_any, int64_t heads, Rest... rest) : qkv(readable(qkv_any)) {
    STD_TORCH_CHECK(
        qkv.dim() == 3 && heads >= 0 && heads <= qkv.size(1) && (qkv.size(1) - heads) % 2 == 0,
        "window_attention: qkv must be (N, H + 2 H_kv, D)");
    args = sizes(qkv, heads, (qkv.size(1) - heads) / 2, rest...);
    args.q = qkv.const_data_ptr();
    args.k = from_head(qkv, heads);
    args.v = from_head(qkv, heads + args.kv_heads);
    args.q_strides = args.k_strides = args.v_strides = strides_of(qkv);
  }
};

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
  const int64_t each = window_attention_scratch(args, largest_window(args.views));
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

Tensor forward(WindowAttention& args, const Tensor& like) {
  Tensor out = new_empty(like, {like.size(0), args.heads, args.head_dim});
  args.out = out.mutable_data_ptr();
  args.out_stride = args.heads * args.head_dim;
#ifdef UHD_CUDA_KERNELS
  launch_on(like, cuda::window_attention_forward, args);
#else
  run(args, like, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_forward, args, begin, end, scratch);
  });
  zero_rows(out, args.views.num_tokens());
#endif
  return out;
}

// Writes the gradients, which the arguments point to.
void backward(WindowAttention& args, const Tensor& like, const Tensor& grad_out_any) {
  const Tensor grad_out = readable(grad_out_any);
  check(grad_out, like, args.heads, "grad_out");
  args.grad_out = grad_out.const_data_ptr();
  args.grad_out_strides = strides_of(grad_out);
#ifdef UHD_CUDA_KERNELS
  const OnDevice guard(like);  // scratch and launch must choose their kernels by the same limits
  // Statistics of each row of the softmax, for the kernels that need two passes.
  const ScalarType wide =
      like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor scratch = new_empty(like, {cuda::window_attention_backward_scratch(args)}, wide);
  args.scratch = scratch.mutable_data_ptr();
  launch_on(like, cuda::window_attention_backward, args);
#else
  run(args, like, [&](int64_t begin, int64_t end, void* scratch) {
    UHD_CALL_ISA(window_attention_backward, args, begin, end, scratch);
  });
#endif
}

// The kernels for CUDA write the zeros of padding themselves.
void zero_padding([[maybe_unused]] Tensor& grad, [[maybe_unused]] const WindowAttention& args) {
#ifndef UHD_CUDA_KERNELS
  zero_rows(grad, args.views.num_tokens());
#endif
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients backward(Separate& call, const Tensor& grad_out) {
  WindowAttention& args = call.args;
  const int64_t tokens = call.q.size(0);
  Tensor grad_q = new_empty(call.q, {tokens, args.heads, args.head_dim});
  Tensor grad_k = new_empty(call.q, {tokens, args.kv_heads, args.head_dim});
  Tensor grad_v = new_empty(call.q, {tokens, args.kv_heads, args.head_dim});
  args.grad_q = grad_q.mutable_data_ptr();
  args.grad_k = grad_k.mutable_data_ptr();
  args.grad_v = grad_v.mutable_data_ptr();
  args.grad_q_stride = args.heads * args.head_dim;
  args.grad_kv_stride = args.kv_heads * args.head_dim;
  backward(args, call.q, grad_out);
  for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) zero_padding(*grad, args);
  return {grad_q, grad_k, grad_v};
}

Tensor backward(Packed& call, const Tensor& grad_out) {
  WindowAttention& args = call.args;
  const int64_t all_heads = call.qkv.size(1), dim = args.head_dim;
  Tensor grad = new_empty(call.qkv, {call.qkv.size(0), all_heads, dim});
  args.grad_q = grad.mutable_data_ptr();
  args.grad_k = from_head(args.grad_q, grad, args.heads, dim);
  args.grad_v = from_head(args.grad_k, grad, args.kv_heads, dim);
  args.grad_q_stride = args.grad_kv_stride = all_heads * dim;
  backward(args, call.qkv, grad_out);
  zero_padding(grad, args);
  return grad;
}

Tensor separate_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& views,
                        int64_t window, int64_t num_windows, double scale, bool window_order) {
  Separate call(q, k, v, views, window, num_windows, scale, window_order);
  return forward(call.args, call.q);
}

Gradients separate_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                            const Tensor& v, const Tensor& views, int64_t window,
                            int64_t num_windows, double scale, bool window_order) {
  Separate call(q, k, v, views, window, num_windows, scale, window_order);
  return backward(call, grad_out);
}

Tensor packed_forward(const Tensor& qkv, int64_t num_heads, const Tensor& views, int64_t window,
                      int64_t num_windows, double scale, bool window_order) {
  Packed call(qkv, num_heads, views, window, num_windows, scale, window_order);
  return forward(call.args, call.qkv);
}

Tensor packed_backward(const Tensor& grad_out, const Tensor& qkv, int64_t num_heads,
                       const Tensor& views, int64_t window, int64_t num_windows, double scale,
                       bool window_order) {
  Packed call(qkv, num_heads, views, window, num_windows, scale, window_order);
  return backward(call, grad_out);
}

// The rotary embedding of a call, for as long as the arguments point into its tensors. On CUDA a
// kernel of its own rotates q and k, and their gradients back.
class Rotary {
 public:
  Rotary(WindowAttention& args, const Tensor& like, const Tensor& cos, const Tensor& sin,
         int64_t parts)
      : cos_(torch::stable::contiguous(cos)), sin_(torch::stable::contiguous(sin)), like_(like) {
    const ScalarType wide =
        like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    for (const Tensor* table : {&cos_, &sin_}) {
      STD_TORCH_CHECK(table->dim() == 3 && table->size(0) == like.size(0) &&
                          (table->size(1) == 1 || table->size(1) == args.heads) &&
                          table->size(1) == cos_.size(1) && table->size(2) == args.head_dim &&
                          table->scalar_type() == wide,
                      "window_attention: a rotary table must be (N, 1 or H, D)");
    }
    const bool shared = cos_.size(1) == 1;
    STD_TORCH_CHECK(shared || args.group == 1,
                    "window_attention: rotary tables per head need as many heads of k");
    STD_TORCH_CHECK(parts >= 0 && args.head_dim % checked_product(2, parts == 0 ? 1 : parts) == 0,
                    "window_attention: channels cannot pair in ", parts, " parts");
    args.cos = cos_.const_data_ptr();
    args.sin = sin_.const_data_ptr();
    args.table_strides = {cos_.size(1) * args.head_dim, shared ? 0 : args.head_dim};
    args.rotary_parts = parts;
#ifdef UHD_CUDA_KERNELS
    q_ = new_empty(like, {like.size(0), args.heads, args.head_dim});
    k_ = new_empty(like, {like.size(0), args.kv_heads, args.head_dim});
    rotate(args, args.heads, args.q, args.q_strides, q_.mutable_data_ptr(), strides_of(q_), false);
    rotate(args, args.kv_heads, args.k, args.k_strides, k_.mutable_data_ptr(), strides_of(k_),
           false);
    args.q = q_.const_data_ptr();
    args.k = k_.const_data_ptr();
    args.q_strides = strides_of(q_);
    args.k_strides = strides_of(k_);
#endif
  }
  void turn_back([[maybe_unused]] const WindowAttention& args) const {
#ifdef UHD_CUDA_KERNELS
    const TokenStrides q = {args.grad_q_stride, args.head_dim};
    const TokenStrides k = {args.grad_kv_stride, args.head_dim};
    rotate(args, args.heads, args.grad_q, q, args.grad_q, q, true);
    rotate(args, args.kv_heads, args.grad_k, k, args.grad_k, k, true);
#endif
  }

 private:
#ifdef UHD_CUDA_KERNELS
  void rotate(const WindowAttention& args, int64_t heads, const void* x, TokenStrides strides,
              void* out, TokenStrides out_strides, bool back) const {
    launch_on(like_, cuda::rotate_heads,
              {args.views, args.dtype, heads, args.head_dim, args.rotary_parts, x, strides,
               args.cos, args.sin, args.table_strides, out, out_strides.token, back});
  }

  Tensor q_, k_;
#endif
  Tensor cos_, sin_, like_;
};

// q, k and v; or q alone, which then holds all three.
Tensor rotary_forward(const Tensor& q, std::optional<Tensor> k, std::optional<Tensor> v,
                      int64_t num_heads, const Tensor& cos, const Tensor& sin, int64_t parts,
                      const Tensor& views, int64_t window, int64_t num_windows, double scale,
                      bool window_order) {
  if (k && v) {
    Separate call(q, *k, *v, views, window, num_windows, scale, window_order);
    const Rotary rotary(call.args, call.q, cos, sin, parts);
    return forward(call.args, call.q);
  }
  Packed call(q, num_heads, views, window, num_windows, scale, window_order);
  const Rotary rotary(call.args, call.qkv, cos, sin, parts);
  return forward(call.args, call.qkv);
}

// Three gradients; or one, and two that hold nothing.
Gradients rotary_backward(const Tensor& grad_out, const Tensor& q, std::optional<Tensor> k,
                          std::optional<Tensor> v, int64_t num_heads, const Tensor& cos,
                          const Tensor& sin, int64_t parts, const Tensor& views, int64_t window,
                          int64_t num_windows, double scale, bool window_order) {
  if (k && v) {
    Separate call(q, *k, *v, views, window, num_windows, scale, window_order);
    const Rotary rotary(call.args, call.q, cos, sin, parts);
    const Gradients grads = backward(call, grad_out);
    rotary.turn_back(call.args);
    return grads;
  }
  Packed call(q, num_heads, views, window, num_windows, scale, window_order);
  const Rotary rotary(call.args, call.qkv, cos, sin, parts);
  const Tensor grad = backward(call, grad_out);
  rotary.turn_back(call.args);
  return {grad, new_empty(call.qkv, {0}), new_empty(call.qkv, {0})};
}

}  // namespace
}  // namespace uhd

STABLE_TORCH_LIBRARY_IMPL(uhd_ops, UHD_DEVICE_KEY, m) {
  m.impl("window_attention", UHD_BOX(&uhd::separate_forward));
  m.impl("_window_attention_backward", UHD_BOX(&uhd::separate_backward));
  m.impl("window_attention_qkvpacked", UHD_BOX(&uhd::packed_forward));
  m.impl("_window_attention_qkvpacked_backward", UHD_BOX(&uhd::packed_backward));
  m.impl("_window_attention_rotary", UHD_BOX(&uhd::rotary_forward));
  m.impl("_window_attention_rotary_backward", UHD_BOX(&uhd::rotary_backward));
}
