// SPDX-License-Identifier: Apache-2.0
#include "driver/checks.h"
#include "driver/layouts.h"
#include "unshuffle_norm/unshuffle_norm.h"

namespace uhd {
namespace driver {
namespace {

struct Case {
  const Layout& layout;
  int64_t window, channels, gap;
  bool affine, residual;
  int64_t merged() const { return window * window * channels; }
  std::string name() const {
    return layout.name() + ", " + std::to_string(channels) + " channels, gap " +
           std::to_string(gap) + (affine ? ", affine" : "") + (residual ? ", residual" : "");
  }
  // Roundings on the way to an output: a sum over the channels of a window, and some arithmetic.
  double sums() const { return static_cast<double>(merged()) + 32; }
};

struct Inputs {
  Matrix x, weight, bias, grad_z, grad_residual, mean, rstd;
};

// The statistics of a backward pass are those of its x, rounded.
void add_statistics(const Case& one, DType dtype, Inputs& inputs) {
  const int64_t rows = one.layout.window_rows(), real = one.layout.num_windows();
  HostSide host;
  UnshuffleNorm args{};
  args.views = one.layout.table(host);
  args.dtype = DType::kFloat64;
  args.channels = one.channels;
  args.eps = 1e-6;
  args.x = inputs.x.values.data();
  args.x_stride = inputs.x.stride;
  std::vector<double> z(static_cast<size_t>(rows * one.merged()));
  args.z = z.data();
  for (Matrix* statistic : {&inputs.mean, &inputs.rstd}) {
    *statistic = {statistic == &inputs.mean ? "mean" : "rstd", wide(dtype), rows, 1, 1, {}};
    statistic->values.assign(static_cast<size_t>(rows), 0.0);
  }
  args.mean = inputs.mean.values.data();
  args.rstd = inputs.rstd.values.data();
  if (real > 0) scalar::unshuffle_norm_forward(args, 0, real);
  for (Matrix* statistic : {&inputs.mean, &inputs.rstd}) {
    for (double& value : statistic->values) value = round_to(statistic->dtype, value);
  }
}

Inputs inputs_of(Random& random, const Case& one, DType dtype) {
  const Layout& layout = one.layout;
  const int64_t tokens = layout.token_rows(), windows = layout.window_rows();
  const int64_t real = layout.num_windows(), merged = one.merged();
  // The mean of x is not zero, so that a mean over few channels has no large relative error.
  Inputs inputs{
      random_matrix(random, "x", dtype, tokens, one.channels, layout.num_tokens(), one.gap, 0.5),
      random_matrix(random, "norm_weight", wide(dtype), 1, merged, 1),
      random_matrix(random, "norm_bias", wide(dtype), 1, merged, 1),
      random_matrix(random, "grad_z", dtype, windows, merged, real, one.gap),
      random_matrix(random, "grad_residual", dtype, windows, one.channels, real, one.gap),
      {},
      {}};
  add_statistics(one, dtype, inputs);
  return inputs;
}

UnshuffleNorm arguments_of(Side& side, bool forward, DType dtype, const Case& one,
                           const Inputs& inputs) {
  const Layout& layout = one.layout;
  const int64_t windows = layout.window_rows(), real = layout.num_windows();
  UnshuffleNorm args{};
  args.views = layout.table(side);
  args.dtype = side.dtype();
  args.channels = one.channels;
  args.eps = 1e-6;
  args.x = side.input(inputs.x);
  args.x_stride = inputs.x.stride;
  if (one.affine) args.norm_weight = side.input(inputs.weight);
  const Limit limit{1, one.sums()}, wide_limit{0, one.sums()};
  if (forward) {
    if (one.affine) args.norm_bias = side.input(inputs.bias);
    args.z = side.output({"z", dtype, windows, one.merged(), real, limit});
    if (one.residual) {
      args.residual = side.output({"residual", dtype, windows, one.channels, real, limit});
    }
    args.mean = side.output({"mean", wide(dtype), windows, 1, real, wide_limit});
    args.rstd = side.output({"rstd", wide(dtype), windows, 1, real, wide_limit});
    return args;
  }
  args.mean = const_cast<void*>(side.input(inputs.mean));
  args.rstd = const_cast<void*>(side.input(inputs.rstd));
  args.grad_z = side.input(inputs.grad_z);
  args.grad_z_stride = inputs.grad_z.stride;
  if (one.residual) {
    args.grad_residual = side.input(inputs.grad_residual);
    args.grad_residual_stride = inputs.grad_residual.stride;
  }
  args.grad_x =
      side.output({"grad_x", dtype, layout.token_rows(), one.channels, layout.num_tokens(), limit});
  if (one.affine) {
    const Limit sum_limit{0, one.sums() + static_cast<double>(real)};
    const int64_t blocks =
        side.on_device() ? cuda::unshuffle_norm_blocks(args) : ceil_div(real, kWindowsPerBlock);
    args.partials = side.scratch(blocks * 2 * one.merged());
    args.grad_norm_weight =
        side.output({"grad_norm_weight", wide(dtype), 1, one.merged(), 1, sum_limit});
    args.grad_norm_bias =
        side.output({"grad_norm_bias", wide(dtype), 1, one.merged(), 1, sum_limit});
  }
  return args;
}

void run_reference(bool forward, const Case& one, const UnshuffleNorm& args) {
  const int64_t real = one.layout.num_windows();
  if (real == 0) return;
  if (forward) return scalar::unshuffle_norm_forward(args, 0, real);
  scalar::unshuffle_norm_backward(args, 0, ceil_div(real, kWindowsPerBlock));
  if (one.affine) scalar::unshuffle_norm_sum_partials(args, 0, one.merged());
}

}  // namespace

void check_unshuffle_norm(Report& report, bool quick) {
  constexpr int64_t kChannels[] = {8, 72, 5, 264};
  const std::vector<int64_t> windows =
      quick ? std::vector<int64_t>{2, 3} : std::vector<int64_t>{1, 2, 3, 4};
  for (const bool forward : {true, false}) {
    for (DType dtype : kDTypes) {
      report.begin_group(std::string("unshuffle_norm ") + (forward ? "forward " : "backward ") +
                         name_of(dtype));
      Random random(17);
      unsigned count = 0;
      for (const int64_t window : windows) {
        for (const Layout& layout : layouts(window, quick)) {
          for (int i = 0; i < (quick ? 1 : 2); ++i, ++count) {
            const Case one{layout,           window,         kChannels[count / 2 % 4],
                           kGaps[count % 3], count % 4 != 3, count % 2 == 0};
            const Inputs inputs = inputs_of(random, one, dtype);
            report.check(
                one.name(), dtype,
                [&](Side& side) { return arguments_of(side, forward, dtype, one, inputs); },
                [&](const UnshuffleNorm& args) { run_reference(forward, one, args); },
                forward ? cuda::unshuffle_norm_forward : cuda::unshuffle_norm_backward);
          }
        }
      }
    }
  }
}

}  // namespace driver
}  // namespace uhd
