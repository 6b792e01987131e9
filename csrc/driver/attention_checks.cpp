// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "driver/checks.h"
#include "driver/layouts.h"
#include "window_attention/window_attention.h"

namespace uhd {
namespace driver {
namespace {

struct Case {
  const Layout& layout;
  int64_t window, heads, head_dim, gap;
  bool window_order;
  std::string name() const {
    return layout.name() + ", " + std::to_string(heads) + " heads of " + std::to_string(head_dim) +
           ", gap " + std::to_string(gap) + (window_order ? ", window order" : "");
  }
  int64_t width() const { return heads * head_dim; }
  // Roundings on the way to an output: a product of head_dim terms, the exponential of a number of
  // up to some tens, and a sum over the tokens of a window.
  double sums() const { return static_cast<double>(head_dim + window * window) + 32; }
};

// q, k, v side by side in the rows of one tensor, as a linear layer writes them.
struct Inputs {
  Matrix qkv, grad_out;
};

WindowAttention arguments_of(Side& side, bool forward, DType dtype, const Case& one,
                             const Inputs& inputs) {
  const Layout& layout = one.layout;
  WindowAttention args{};
  args.views = layout.table(side);
  args.dtype = side.dtype();
  args.heads = one.heads;
  args.head_dim = one.head_dim;
  // Sharper than usual, so that single keys count.
  args.scale = 2 / std::sqrt(static_cast<double>(one.head_dim));
  args.window_order = one.window_order;
  args.q = side.input(inputs.qkv);
  args.k = side.at(args.q, one.width());
  args.v = side.at(args.k, one.width());
  args.q_strides = args.k_strides = args.v_strides = {inputs.qkv.stride, one.head_dim};
  const auto output = [&](const char* name, double roundings) {
    return side.output({name,
                        dtype,
                        layout.token_rows(),
                        one.width(),
                        layout.num_tokens(),
                        {roundings, one.sums()}});
  };
  if (forward) {
    args.out = output("out", 2);  // of the probabilities, and at the store
    return args;
  }
  args.grad_out = side.input(inputs.grad_out);
  args.grad_out_strides = {inputs.grad_out.stride, one.head_dim};
  args.grad_q = output("grad_q", 3);  // of probabilities and gradients of scores, and at the store
  args.grad_k = output("grad_k", 3);
  args.grad_v = output("grad_v", 2);
  if (side.on_device()) args.scratch = side.scratch(cuda::window_attention_backward_scratch(args));
  return args;
}

void run_reference(bool forward, const Case& one, const WindowAttention& args) {
  const int64_t end = one.layout.num_windows();
  if (end == 0) return;
  std::vector<double> scratch(
      static_cast<size_t>(window_attention_scratch(one.window * one.window, args.head_dim)));
  forward ? scalar::window_attention_forward(args, 0, end, scratch.data())
          : scalar::window_attention_backward(args, 0, end, scratch.data());
}

void check_case(Report& report, bool forward, DType dtype, Random& random, const Case& one) {
  const Layout& layout = one.layout;
  const int64_t rows = layout.token_rows(), real = layout.num_tokens();
  const Inputs inputs{random_matrix(random, "qkv", dtype, rows, 3 * one.width(), real, one.gap),
                      random_matrix(random, "grad_out", dtype, rows, one.width(), real, one.gap)};
  report.check(
      one.name(), dtype,
      [&](Side& side) { return arguments_of(side, forward, dtype, one, inputs); },
      [&](const WindowAttention& args) { run_reference(forward, one, args); },
      forward ? cuda::window_attention_forward : cuda::window_attention_backward);
}

}  // namespace

void check_window_attention(Report& report, bool quick) {
  using Numbers = std::vector<int64_t>;
  const Numbers windows = quick ? Numbers{2, 3, 8} : Numbers{1, 2, 3, 4, 5, 8, 16};
  const Numbers head_dims = quick ? Numbers{72} : Numbers{8, 64, 72, 80, 96, 128, 20, 7};
  for (const bool forward : {true, false}) {
    for (DType dtype : kDTypes) {
      report.begin_group(std::string("window_attention ") + (forward ? "forward " : "backward ") +
                         name_of(dtype));
      Random random(13);
      size_t count = 0;
      for (const int64_t window : windows) {
        const std::vector<Layout> all = layouts(window, quick);
        for (const int64_t head_dim : head_dims) {
          // Two of the layouts with each head size, others with the next.
          for (int i = 0; i < (quick ? 1 : 2); ++i) {
            const Layout& layout = all[count % all.size()];
            const int64_t heads = 1 + static_cast<int64_t>(count % 5);
            check_case(report, forward, dtype, random,
                       {layout, window, heads, head_dim, kGaps[count / 2 % 3], count % 4 < 2});
            ++count;
          }
        }
      }
    }
  }
}

}  // namespace driver
}  // namespace uhd
