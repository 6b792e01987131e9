// SPDX-License-Identifier: Apache-2.0
// One case per code path of the CUDA kernels; what decides between the paths stands beside each.
#include "driver/side.h"
#include "linear_activation/linear_activation.h"
#include "pixel_unshuffle/pixel_unshuffle.h"
#include "tile_weight/tile_weight.h"
#include "unshuffle_norm/unshuffle_norm.h"
#include "window_attention/window_attention.h"
#include "window_mean/window_mean.h"
#include "window_pool/window_pool.h"

namespace uhd {
namespace driver {
namespace {

// ---- views, with rows of padding after the tokens and after the windows

struct Views {
  std::vector<ViewRow> rows;
  int64_t side, token_rows, window_rows;

  Views(int64_t side_, const std::vector<std::pair<int64_t, int64_t>>& grids) : side(side_) {
    ViewRow row{};
    for (const auto& [height, width] : grids) {
      row.height = height;
      row.width = width;
      rows.push_back(row);
      row.token_begin += height * width;
      row.window_begin += ceil_div(height, side) * ceil_div(width, side);
    }
    rows.push_back({row.token_begin, 0, 0, row.window_begin});
    token_rows = row.token_begin + 3;
    window_rows = row.window_begin + 2;
  }
  int64_t windows() const { return rows.back().window_begin; }
  ViewTable table(Side& at) const {
    return {at.views(rows), static_cast<int64_t>(rows.size()) - 1, side, token_rows, window_rows};
  }
  const void* per_token(Side& at, int64_t width) const {
    return at.input(token_rows * width, rows.back().token_begin * width);
  }
  const void* per_window(Side& at, int64_t width) const {
    return at.input(window_rows * width, windows() * width);
  }
};

// A view without tokens, whole windows, more than a block has of the small ones, windows that are
// ragged at both edges, and a window of one token.
Views ragged(int64_t side) {
  const int64_t whole = side <= 4 ? 4 * side : side;
  return {side, {{0, 3}, {whole, whole}, {side + 1, side + side / 2}, {1, 1}}};
}

// ---- calls

template <class Args>
Args row_per_window(Side& side, const Views& views, int64_t channels) {
  Args args{};
  args.views = views.table(side);
  args.dtype = side.dtype();
  args.channels = channels;
  args.x = views.per_token(side, channels);
  args.x_stride = channels;
  args.grad_x = side.output("grad_x", views.token_rows * channels);
  return args;
}

#define UHD_KERNELS(op) \
  cuda::op##_forward, scalar::op##_forward, cuda::op##_backward, scalar::op##_backward

// Of mean, pooling and pixel-unshuffle; `width` is that of a row of results.
template <class Args, class Cuda, class Scalar>
void run_windows(Side& side, const Views& views, Args args, int64_t width, Cuda* cuda_forward,
                 Scalar* forward, Cuda* cuda_backward, Scalar* backward) {
  args.out = side.output("out", views.window_rows * width);
  args.grad_out = views.per_window(side, width);
  args.grad_out_stride = width;
  side.run(args, cuda_forward, forward, views.windows());
  side.run(args, cuda_backward, backward, views.windows());
}

void run_norm(Side& side, const Views& views, int64_t channels, bool all) {
  const int64_t merged = views.side * views.side * channels, rows = views.window_rows;
  const int64_t host_blocks = ceil_div(views.windows(), kWindowsPerBlock);
  auto args = row_per_window<UnshuffleNorm>(side, views, channels);
  args.eps = 1e-6;
  args.z = side.output("z", rows * merged);
  args.mean = side.statistic("mean", rows);
  args.rstd = side.statistic("rstd", rows);
  args.grad_z = views.per_window(side, merged);
  args.grad_z_stride = merged;
  if (all) {
    args.norm_weight = side.parameter(merged);
    args.norm_bias = side.parameter(merged);
    args.residual = side.output("residual", rows * channels);
    args.grad_residual = views.per_window(side, channels);
    args.grad_residual_stride = channels;
    args.grad_norm_weight = side.statistic("grad_norm_weight", merged);
    args.grad_norm_bias = side.statistic("grad_norm_bias", merged);
    const int64_t blocks = side.on_device() ? cuda::unshuffle_norm_blocks(args) : host_blocks;
    args.partials = side.scratch(blocks * 2 * merged);
  }
  side.run(args, cuda::unshuffle_norm_forward, scalar::unshuffle_norm_forward, views.windows());
  side.run(args, cuda::unshuffle_norm_backward, scalar::unshuffle_norm_backward, host_blocks);
  if (all && !side.on_device()) scalar::unshuffle_norm_sum_partials(args, 0, merged);
}

// In window-major order, and with the gradients in one tensor, if `packed`; else neither. With a
// rotary embedding, which of both kernels only those of the CPU apply, unless rotary_parts < 0.
void run_attention(Side& side, const Views& views, int64_t heads, int64_t kv_heads,
                   int64_t head_dim, bool packed, int64_t rotary_parts = -1) {
  const int64_t width = heads * head_dim, kv_width = kv_heads * head_dim, rows = views.token_rows;
  const int64_t all = width + 2 * kv_width;
  WindowAttention args{};
  args.views = views.table(side);
  args.dtype = side.dtype();
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.group = heads / kv_heads;
  args.head_dim = head_dim;
  args.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  args.window_order = packed;
  args.q = views.per_token(side, all);  // q, k and v side by side in its rows
  args.k = side.at(args.q, width);
  args.v = side.at(args.k, kv_width);
  args.q_strides = args.k_strides = args.v_strides = {all, head_dim};
  args.out = side.output("out", rows * width);
  args.out_stride = width;
  if (rotary_parts >= 0) {
    args.cos = side.parameter(rows * head_dim);
    args.sin = side.parameter(rows * head_dim);
    args.table_strides = {head_dim, 0};
    args.rotary_parts = rotary_parts;
    args.scale = 1 / (8 * static_cast<double>(head_dim));  // these sines and cosines go up to 2.5
  }
  std::vector<double> scratch(
      static_cast<size_t>(window_attention_scratch(args, views.side * views.side)));
  const auto with_scratch = [&](auto* kernel) {
    return [&scratch, kernel](const WindowAttention& host, int64_t begin, int64_t end) {
      kernel(host, begin, end, scratch.data());
    };
  };
  side.run(args, cuda::window_attention_forward, with_scratch(scalar::window_attention_forward),
           views.windows());
  args.grad_out = views.per_token(side, width);
  args.grad_out_strides = {width, head_dim};
  if (packed) {
    args.grad_q = side.output("grad_qkv", rows * all);
    args.grad_k = const_cast<void*>(side.at(args.grad_q, width));
    args.grad_v = const_cast<void*>(side.at(args.grad_k, kv_width));
    args.grad_q_stride = args.grad_kv_stride = all;
  } else {
    args.grad_q = side.output("grad_q", rows * width);
    args.grad_k = side.output("grad_k", rows * kv_width);
    args.grad_v = side.output("grad_v", rows * kv_width);
    args.grad_q_stride = width;
    args.grad_kv_stride = kv_width;
  }
  if (side.on_device()) args.scratch = side.scratch(cuda::window_attention_backward_scratch(args));
  side.run(args, cuda::window_attention_backward, with_scratch(scalar::window_attention_backward),
           views.windows());
}

#ifndef UHD_RACES  // on the CPU, window_attention rotates

// The definition, for the tokens [begin, end) of the host. The way back is the transposed matrix.
void rotate_by_definition(const RotateHeads& args, int64_t begin, int64_t end) {
  const int64_t dim = args.head_dim, apart = args.parts == 0 ? 1 : dim / (2 * args.parts);
  for (int64_t i = begin * args.heads; i < end * args.heads; ++i) {
    const int64_t token = i / args.heads, head = i % args.heads;
    const auto at = [=](const void* first, TokenStrides strides) {
      return static_cast<const double*>(first) + token * strides.token + head * strides.head;
    };
    const double *x = at(args.x, args.x_strides), *cos = at(args.cos, args.table_strides),
                 *sin = at(args.sin, args.table_strides);
    const std::vector<double> row(x, x + dim);  // x may be out
    double* out = static_cast<double*>(args.out) + token * args.out_stride + head * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const bool second = c / apart % 2;
      const int64_t other = second ? c - apart : c + apart;
      const double product = row[static_cast<size_t>(other)] * sin[args.back ? other : c];
      out[c] = row[static_cast<size_t>(c)] * cos[c] + (second != args.back ? product : -product);
    }
  }
}

// From rows that are wider than the heads, forth and back, and back again in place.
void run_rotary(Side& side, const Views& views, int64_t heads, int64_t head_dim, int64_t parts,
                bool table_per_head) {
  const int64_t tokens = views.rows.back().token_begin, width = heads * head_dim;
  const int64_t angles = table_per_head ? width : head_dim;
  RotateHeads args{};
  args.views = views.table(side);
  args.dtype = side.dtype();
  args.heads = heads;
  args.head_dim = head_dim;
  args.parts = parts;
  args.x = views.per_token(side, 2 * width);
  args.x_strides = {2 * width, head_dim};
  args.cos = side.parameter(tokens * angles);
  args.sin = side.parameter(tokens * angles);
  args.table_strides = {angles, table_per_head ? head_dim : 0};
  args.out_stride = width;
  args.out = side.output("rotated", tokens * width);
  side.run(args, cuda::rotate_heads, rotate_by_definition, tokens);
  args.back = true;
  args.out = side.output("back twice", tokens * width);
  side.run(args, cuda::rotate_heads, rotate_by_definition, tokens);
  args.x = args.out;
  args.x_strides = {width, head_dim};
  side.run(args, cuda::rotate_heads, rotate_by_definition, tokens);
}

#endif

void run_activation(Side& side, int activation, int64_t rows, int64_t group, int64_t width,
                    bool bias) {
  const int64_t count = rows * group * width;
  LinearActivation args{};
  args.dtype = side.dtype();
  args.activation = static_cast<Activation>(activation);
  args.width = args.grad_h_stride = width;
  args.group = group;
  args.rows = rows;
  args.u = side.input(count, count);
  args.h = side.output("h", rows * width);
  args.grad_h = side.input(rows * width, rows * width);
  args.grad_u = side.output("grad_u", count);
  if (bias) {
    args.bias = side.input(width, width);
    args.partials = side.scratch(args.blocks() * width);
    args.grad_bias = side.statistic("grad_bias", width);
  }
  side.run(args, cuda::linear_activation_forward, scalar::linear_activation_forward, rows);
  side.run(args, cuda::linear_activation_backward, scalar::linear_activation_backward,
           args.blocks());
  if (bias && !side.on_device()) scalar::linear_activation_sum_partials(args, 0, width);
}

void run_tiles(Side& side, TileWeight args) {
  const int64_t small = args.rows * args.cols, large = args.out_rows() * args.out_cols();
  args.dtype = side.dtype();
  args.weight = side.input(small, small);
  args.weight_stride = args.cols;
  args.out = side.output("out", large);
  args.grad_out = side.input(large, large);
  args.grad_out_stride = args.out_cols();
  args.grad_weight = side.output("grad_weight", small);
  side.run(args, cuda::tile_weight_forward, scalar::tile_weight_forward, args.out_rows());
  side.run(args, cuda::tile_weight_backward, scalar::tile_weight_backward, small);
}

// ---- lists

using Cases = std::vector<Case>;
using Numbers = std::initializer_list<int64_t>;
constexpr DType kFloat = DType::kFloat32, kDouble = DType::kFloat64;
constexpr DType kBrain = DType::kBFloat16, kHalf = DType::kFloat16;

void add_attention(Cases& cases, DType dtype, Numbers sides, Numbers head_dims, int64_t heads = 2,
                   int64_t empty_windows = 0, int64_t group = 1) {
  for (const int64_t head_dim : head_dims) {
    for (const int64_t side : sides) {
      Views views = ragged(side);
      views.window_rows += empty_windows;
      const bool packed = cases.size() % 2;
      // Scores are below 16, so an error of a score is 16 times as much of its probability.
      cases.push_back({"window_attention, side " + std::to_string(side) + ", head size " +
                           std::to_string(head_dim),
                       dtype, 16 * head_dim + group * side * side, [=](Side& at) {
                         run_attention(at, views, heads, heads / group, head_dim, packed);
                       }});
    }
  }
}

void add_row_per_window(Cases& cases, DType dtype, const Views& views, int64_t channels) {
  const int64_t slots = views.side * views.side, merged = slots * channels;
  const std::string sizes =
      ", side " + std::to_string(views.side) + ", " + std::to_string(channels) + " channels";
  cases.push_back({"window_mean" + sizes, dtype, slots, [=](Side& at) {
                     const auto args = row_per_window<WindowMean>(at, views, channels);
                     run_windows(at, views, args, channels, UHD_KERNELS(window_mean));
                   }});
  cases.push_back({"pixel_unshuffle" + sizes, dtype, slots, [=](Side& at) {
                     const auto args = row_per_window<PixelUnshuffle>(at, views, channels);
                     run_windows(at, views, args, merged, UHD_KERNELS(pixel_unshuffle));
                   }});
  cases.push_back({"window_pool" + sizes, dtype, 2 * slots, [=](Side& at) {
                     auto args = row_per_window<WindowPool>(at, views, channels);
                     args.logits = views.per_token(at, channels);
                     args.logits_stride = channels;
                     args.grad_logits = at.output("grad_logits", views.token_rows * channels);
                     run_windows(at, views, args, channels, UHD_KERNELS(window_pool));
                   }});
  for (const bool all : {true, false}) {
    cases.push_back({std::string(all ? "unshuffle_norm" : "unshuffle_norm alone") + sizes, dtype,
                     merged + views.windows(),
                     [=](Side& at) { run_norm(at, views, channels, all); }});
  }
}

void add_tiles(Cases& cases, DType dtype, int64_t cols) {
  TileWeight args{};
  args.tiles = 4;
  args.rows = 33;
  args.cols = cols;
  const auto add = [&](const char* mode, int64_t down, int64_t across, int64_t divisor) {
    args.down = down;
    args.across = across;
    args.divisor = divisor;
    cases.push_back({std::string("tile_weight, ") + mode + ", " + std::to_string(cols) + " columns",
                     dtype, 4, [=](Side& at) { run_tiles(at, args); }});
  };
  add("block_diagonal", 4, 4, 1);
  add("average", 1, 4, 4);
  add("repeat", 4, 1, 1);
}

}  // namespace

std::vector<Case> all_cases() {
  Cases cases;
  for (const DType dtype : {kFloat, kDouble, kBrain, kHalf}) {
    const auto activation = [&](const char* name, int64_t terms, auto... sizes) {
      cases.push_back({std::string("linear_activation, ") + name, dtype, terms,
                       [=](Side& at) { run_activation(at, sizes...); }});
    };
    for (int i = 0; i < 5; ++i) activation("of each kind", 37 * 4, i, 37, 4, 264, true);
    activation("a group per block, no bias", 70, 0, 3, 70, 24, false);
    activation("by elements", 5 * 9, 1, 5, 9, 7, true);
    // 1152 channels are moved by 16 bytes, 5 by elements; 2 x 2 has code of its own.
    for (const int64_t side : {2, 3}) {
      for (const int64_t channels : {1152, 5}) {
        add_row_per_window(cases, dtype, ragged(side), channels);
      }
    }
    add_row_per_window(cases, dtype, Views(2, {{0, 0}}), 8);  // padding alone
    for (const int64_t cols : {72, 7}) add_tiles(cases, dtype, cols);
    // More pairs than a block has threads, and fewer; neighbours pair, halves, halves of halves.
    for (const int64_t parts : {0, 1, 2}) {
      const int64_t head_dim = parts == 1 ? 8 : 72;
#ifdef UHD_RACES
      for (const int64_t side : {2, 3}) {  // in registers, and through scratch memory
        cases.push_back({"rotary embedding, " + std::to_string(parts) + " parts", dtype,
                         64 * head_dim + 4 * side * side, [=](Side& at) {
                           run_attention(at, ragged(side), 6, 2, head_dim, side == 2, parts);
                         }});
      }
#else
      cases.push_back(
          {"rotary embedding, " + std::to_string(parts) + " parts", dtype, 4,
           [=](Side& at) { run_rotary(at, ragged(2), 5, head_dim, parts, parts != 1); }});
#endif
    }
  }
  // More windows than an H200 holds blocks of two warps: each loops over several.
  const Views many(2, {{132, 132}});
  cases.push_back({"unshuffle_norm, many windows", kBrain, 4 * 264 + many.windows(),
                   [=](Side& at) { run_norm(at, many, 264, true); }});
  // Tensor cores: tiles of 16, 4 or 1 windows in a warp; a block per window, for the backward pass
  // in shared memory at once or in turn; more strips than warps. float16 scales its gradients.
  add_attention(cases, kBrain, {2, 4, 8, 16}, {64, 72, 80, 96, 128});
  add_attention(cases, kBrain, {11}, {128});
  add_attention(cases, kHalf, {1, 2, 3, 4, 5, 8, 11, 16}, {72});
  // So many tiles, though most have no window, that a warp takes four heads, or the one left.
  add_attention(cases, kBrain, {2}, {72}, 5, 4 * 2112);
  // CUDA cores: a head on 8, 16 or 32 lanes, in one piece or several, or by elements; keys in one
  // tile or several.
  add_attention(cases, kFloat, {2, 4}, {7, 64, 72, 128, 320});
  add_attention(cases, kDouble, {2, 3}, {7, 72, 128});
  add_attention(cases, kBrain, {2, 3}, {20, 48, 136});
  add_attention(cases, kHalf, {3}, {20, 48, 136});
  add_attention(cases, kFloat, {8, 16}, {72});
  add_attention(cases, kBrain, {17}, {72});
  // Heads that share keys and values: forward on every kernel, backward on CUDA cores alone.
  add_attention(cases, kBrain, {2, 8}, {72}, 6, 0, 3);
  add_attention(cases, kFloat, {2}, {7, 72}, 6, 0, 3);
#ifdef UHD_RACES
  cases.push_back(planner_case());
#endif
  return cases;
}

}  // namespace driver
}  // namespace uhd
