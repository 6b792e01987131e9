// SPDX-License-Identifier: Apache-2.0
#include "driver/checks.h"
#include "linear_activation/linear_activation.h"

namespace uhd {
namespace driver {
namespace {

struct Case {
  Activation activation;
  int64_t rows, group, width, gap;
  bool bias;
  std::string name() const {
    return "activation " + std::to_string(static_cast<int>(activation)) + ", " +
           std::to_string(rows) + " rows from groups of " + std::to_string(group) + ", width " +
           std::to_string(width) + ", gap " + std::to_string(gap) + (bias ? ", bias" : "");
  }
};

constexpr Activation kActivations[] = {Activation::kGeluTanh, Activation::kGelu,
                                       Activation::kQuickGelu, Activation::kSilu,
                                       Activation::kRelu};
struct Sizes {
  int64_t rows, group, width, gap;
};
constexpr Sizes kSizes[] = {{37, 4, 136, 0}, {5, 9, 7, 1},  {70, 1, 64, 8}, {1, 1, 1, 0},
                            {130, 4, 24, 0}, {0, 4, 16, 0}, {3, 70, 20, 4}, {300, 4, 1160, 0}};
constexpr int kQuickSizes = 2;

struct Inputs {
  Matrix u, bias, grad_h;
};

LinearActivation arguments_of(Side& side, bool forward, DType dtype, const Case& one,
                              const Inputs& inputs) {
  LinearActivation args{};
  args.dtype = side.dtype();
  args.activation = one.activation;
  args.width = one.width;
  args.group = one.group;
  args.rows = one.rows;
  args.u = side.input(inputs.u);
  if (one.bias) args.bias = side.input(inputs.bias);
  // Half types may use approximate functions, with an error below another rounding; the rest is a
  // sum over the group and some tens of operations in a function.
  const double sums = static_cast<double>(one.group) + 64;
  const Limit limit{2, sums};
  if (forward) {
    args.h = side.output({"h", dtype, one.rows, one.width, one.rows, limit});
    return args;
  }
  args.grad_h = side.input(inputs.grad_h);
  args.grad_h_stride = inputs.grad_h.stride;
  const int64_t products = one.rows * one.group;
  args.grad_u = side.output({"grad_u", dtype, products, one.width, products, limit});
  if (one.bias) {
    args.partials = side.scratch(args.blocks() * one.width);
    const Limit sum_limit{1, sums + static_cast<double>(products)};
    args.grad_bias = side.output({"grad_bias", wide(dtype), 1, one.width, 1, sum_limit});
  }
  return args;
}

void run_reference(bool forward, const LinearActivation& args) {
  if (forward) return scalar::linear_activation_forward(args, 0, args.rows);
  scalar::linear_activation_backward(args, 0, args.blocks());
  if (args.partials != nullptr) scalar::linear_activation_sum_partials(args, 0, args.width);
}

}  // namespace

void check_linear_activation(Report& report, bool quick) {
  for (const bool forward : {true, false}) {
    for (DType dtype : kDTypes) {
      report.begin_group(std::string("linear_activation ") + (forward ? "forward " : "backward ") +
                         name_of(dtype));
      Random random(19);
      for (const Activation activation : kActivations) {
        for (int i = 0; i < (quick ? kQuickSizes : static_cast<int>(std::size(kSizes))); ++i) {
          const auto [rows, group, width, gap] = kSizes[i];
          const Case one{activation, rows, group, width, gap, i % 4 != 3};
          const int64_t products = rows * group;
          const Inputs inputs{random_matrix(random, "u", dtype, products, width, products),
                              random_matrix(random, "bias", dtype, 1, width, 1),
                              random_matrix(random, "grad_h", dtype, rows, width, rows, gap)};
          report.check(
              one.name(), dtype,
              [&](Side& side) { return arguments_of(side, forward, dtype, one, inputs); },
              [&](const LinearActivation& args) { run_reference(forward, args); },
              forward ? cuda::linear_activation_forward : cuda::linear_activation_backward);
        }
      }
    }
  }
}

}  // namespace driver
}  // namespace uhd
