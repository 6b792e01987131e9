// SPDX-License-Identifier: Apache-2.0
// The operators that turn the tokens of a window into one row.
#include "driver/checks.h"
#include "driver/layouts.h"
#include "pixel_unshuffle/pixel_unshuffle.h"
#include "window_mean/window_mean.h"
#include "window_pool/window_pool.h"

namespace uhd {
namespace driver {
namespace {

struct Case {
  const Layout& layout;
  int64_t window, channels, gap;
  std::string name() const {
    return layout.name() + ", " + std::to_string(channels) + " channels, gap " +
           std::to_string(gap);
  }
};

// The channels and gaps change from case to case; all pairs of them come up.
template <class Body>
void for_cases(Report& report, const char* name, bool quick, Body&& body) {
  constexpr int64_t kChannels[] = {8, 72, 5, 264};
  const std::vector<int64_t> windows =
      quick ? std::vector<int64_t>{2, 3} : std::vector<int64_t>{1, 2, 3, 4, 7};
  for (const bool forward : {true, false}) {
    for (DType dtype : kDTypes) {
      report.begin_group(std::string(name) + (forward ? " forward " : " backward ") +
                         name_of(dtype));
      Random random(11);
      size_t count = 0;
      for (const int64_t window : windows) {
        for (const Layout& layout : layouts(window, quick)) {
          const Case one{layout, window, kChannels[count % 4], kGaps[count % 3]};
          ++count;
          body(forward, dtype, random, one);
        }
      }
    }
  }
}

// Mean and pixel-unshuffle have the same tensors; `slots` is the number of tokens in a row of
// outputs.
template <class Args>
Args arguments_of(Side& side, bool forward, DType dtype, const Case& one, int64_t slots,
                  const Matrix& input, Limit limit) {
  Args args{};
  args.views = one.layout.table(side);
  args.dtype = side.dtype();
  args.channels = one.channels;
  const Layout& layout = one.layout;
  if (forward) {
    args.x = side.input(input);
    args.x_stride = input.stride;
    args.out = side.output(
        {"out", dtype, layout.window_rows(), slots * one.channels, layout.num_windows(), limit});
  } else {
    args.grad_out = side.input(input);
    args.grad_out_stride = input.stride;
    args.grad_x = side.output(
        {"grad_x", dtype, layout.token_rows(), one.channels, layout.num_tokens(), limit});
  }
  return args;
}

Matrix input_of(Random& random, bool forward, DType dtype, const Case& one, int64_t slots) {
  const Layout& layout = one.layout;
  return forward ? random_matrix(random, "x", dtype, layout.token_rows(), one.channels,
                                 layout.num_tokens(), one.gap)
                 : random_matrix(random, "grad_out", dtype, layout.window_rows(),
                                 slots * one.channels, layout.num_windows(), one.gap);
}

WindowPool pool_arguments(Side& side, bool forward, DType dtype, const Case& one, const Matrix& x,
                          const Matrix& logits, const Matrix& grad_out) {
  const Layout& layout = one.layout;
  // A weight: 2 roundings of its exponent, 3 of the exponential, the sum and its quotient. Pooling
  // adds a product per token, the gradient of a logit a difference and 3 products.
  const Limit limit{1, static_cast<double>(2 * one.window * one.window + 10)};
  WindowPool args{};
  args.views = layout.table(side);
  args.dtype = side.dtype();
  args.channels = one.channels;
  args.x = side.input(x);
  args.x_stride = x.stride;
  args.logits = side.input(logits);
  args.logits_stride = logits.stride;
  if (forward) {
    args.out = side.output(
        {"out", dtype, layout.window_rows(), one.channels, layout.num_windows(), limit});
    return args;
  }
  args.grad_out = side.input(grad_out);
  args.grad_out_stride = grad_out.stride;
  args.grad_x =
      side.output({"grad_x", dtype, layout.token_rows(), one.channels, layout.num_tokens(), limit});
  args.grad_logits = side.output(
      {"grad_logits", dtype, layout.token_rows(), one.channels, layout.num_tokens(), limit});
  return args;
}

}  // namespace

void check_window_mean(Report& report, bool quick) {
  for_cases(report, "window_mean", quick,
            [&](bool forward, DType dtype, Random& random, const Case& one) {
              const Matrix input = input_of(random, forward, dtype, one, 1);
              // One addition per token, and the division.
              const Limit limit{1, static_cast<double>(one.window * one.window + 1)};
              report.check(
                  one.name(), dtype,
                  [&](Side& side) {
                    return arguments_of<WindowMean>(side, forward, dtype, one, 1, input, limit);
                  },
                  [&](const WindowMean& args) {
                    const int64_t end = one.layout.num_windows();
                    if (end == 0) return;
                    forward ? scalar::window_mean_forward(args, 0, end)
                            : scalar::window_mean_backward(args, 0, end);
                  },
                  forward ? cuda::window_mean_forward : cuda::window_mean_backward);
            });
}

void check_window_pool(Report& report, bool quick) {
  for_cases(report, "window_pool", quick,
            [&](bool forward, DType dtype, Random& random, const Case& one) {
              const Matrix x = input_of(random, true, dtype, one, 1);
              Matrix logits = input_of(random, true, dtype, one, 1);
              logits.name = "logits";
              const Matrix grad_out = input_of(random, false, dtype, one, 1);
              report.check(
                  one.name(), dtype,
                  [&](Side& side) {
                    return pool_arguments(side, forward, dtype, one, x, logits, grad_out);
                  },
                  [&](const WindowPool& args) {
                    const int64_t end = one.layout.num_windows();
                    if (end == 0) return;
                    forward ? scalar::window_pool_forward(args, 0, end)
                            : scalar::window_pool_backward(args, 0, end);
                  },
                  forward ? cuda::window_pool_forward : cuda::window_pool_backward);
            });
}

void check_pixel_unshuffle(Report& report, bool quick) {
  for_cases(report, "pixel_unshuffle", quick,
            [&](bool forward, DType dtype, Random& random, const Case& one) {
              const int64_t slots = one.window * one.window;
              const Matrix input = input_of(random, forward, dtype, one, slots);
              // A token's gradient is the sum over the slots that repeat it, at most all.
              const Limit limit = forward ? kSameBits : Limit{1, static_cast<double>(slots)};
              report.check(
                  one.name(), dtype,
                  [&](Side& side) {
                    return arguments_of<PixelUnshuffle>(side, forward, dtype, one, slots, input,
                                                        limit);
                  },
                  [&](const PixelUnshuffle& args) {
                    const int64_t end = one.layout.num_windows();
                    if (end == 0) return;
                    forward ? scalar::pixel_unshuffle_forward(args, 0, end)
                            : scalar::pixel_unshuffle_backward(args, 0, end);
                  },
                  forward ? cuda::pixel_unshuffle_forward : cuda::pixel_unshuffle_backward);
            });
}

}  // namespace driver
}  // namespace uhd
