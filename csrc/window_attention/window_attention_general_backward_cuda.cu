// SPDX-License-Identifier: Apache-2.0
// The backward pass of the general kernel, without atomics, in two launches. With P the softmax and
// dP = dO v^T, of which delta is the mean of each row weighted by P:
//   (1) one team per query: the statistics of its row of P, and dq = scale * (P * (dP - delta)) k
//   (2) one team per key: dv = P^T dO and dk = scale * (P * (dP - delta))^T q, added up over the
//       heads of a group, one head after another
// Both compute the scores anew; a sum runs over the tokens of the window in raster order.
#include "window_attention/general_softmax.cuh"
#include "window_attention/general_windows.cuh"
#include "window_attention/general_windows.h"

namespace uhd {
namespace {

// One row of the softmax: P = exp(score - largest) * inverse_sum.
template <class S>
struct RowStatistics {
  S largest, inverse_sum, delta;
};
template <class S>
UHD_DEVICE RowStatistics<S>& statistics(const WindowAttention& args, int64_t token, int64_t head) {
  return static_cast<RowStatistics<S>*>(args.scratch)[token * args.heads + head];
}

// The four tensors of one head.
template <class Shape>
struct Heads {
  Head<Shape> q, k, v, grad_out;
  bool window_order;

  UHD_DEVICE Heads(const WindowAttention& args, int64_t head)
      : q(args, args.q, args.q_strides, head),
        k(args, args.k, args.k_strides, head / args.group),
        v(args, args.v, args.v_strides, head / args.group),
        grad_out(args, args.grad_out, args.grad_out_strides, head),
        window_order(args.window_order) {}
  // The row of grad_out.
  UHD_DEVICE int grad_row(int token, int position) const { return window_order ? position : token; }
};

// ---- (1) queries

// Scores of up to kKeys keys, and their rows of dP.
template <class Shape>
struct Tile {
  using S = typename Shape::S;
  int count;
  int token[Traits::kKeys];
  S score[Traits::kKeys], grad[Traits::kKeys];

  UHD_DEVICE void read(Walk& keys, const Heads<Shape>& heads, const HeldRow<Shape>& query,
                       const HeldRow<Shape>& grad_out, S scale) {
    count = keys.left();
#pragma unroll
    for (int i = 0; i < Traits::kKeys; ++i, keys.advance()) {
      token[i] = keys.token();
      score[i] = -S(INFINITY);
      grad[i] = 0;
      if (i < count) {
        score[i] = scale * query.dot(heads.k, token[i], heads.k.piece(token[i], 0));
        grad[i] = grad_out.dot(heads.v, token[i], heads.v.piece(token[i], 0));
      }
    }
  }
};

template <class Shape>
UHD_DEVICE void query_gradient(const WindowAttention& args, const Place& place, int64_t head) {
  using T = typename Shape::T;
  using S = typename Shape::S;
  const Heads<Shape> heads(args, head);
  const HeldRow<Shape> query(heads.q, place.token);
  const HeldRow<Shape> grad_out(heads.grad_out, heads.grad_row(place.token, place.position));
  const S scale = S(args.scale);
  Tile<Shape> tile;
  OnlineSoftmax<T> softmax;
  S delta = 0;
  for (Walk keys(place.window); keys.more();) {
    tile.read(keys, heads, query, grad_out, scale);
    S weight[Traits::kKeys];
#pragma unroll
    for (int i = 0; i < Traits::kKeys; ++i) weight[i] = tile.score[i];
    delta *= softmax.add(weight);
#pragma unroll
    for (int i = 0; i < Traits::kKeys; ++i) {
      if (i < tile.count) delta += weight[i] * tile.grad[i];
    }
  }
  const RowStatistics<S> row = {softmax.largest, S(1) / softmax.sum, delta / softmax.sum};
  if (threadIdx.x % Shape::kLanes == 0) statistics<S>(args, place.token, head) = row;

  T* grad_q = result_row<Shape>(args, args.grad_q, args.grad_q_stride, place.token, head);
  const bool one_tile = place.window.size() <= Traits::kKeys;
  for (int64_t begin = 0; begin < args.head_dim; begin += Shape::kSpan) {
    Piece<Shape> sum = Piece<Shape>::zero();
    Walk keys(place.window);
    do {
      if (!one_tile) tile.read(keys, heads, query, grad_out, scale);  // else it is still there
#pragma unroll
      for (int i = 0; i < Traits::kKeys; ++i) {
        if (i >= tile.count) continue;
        const S p = OnlineSoftmax<T>::weight(tile.score[i], row.largest) * row.inverse_sum;
        sum.add(p * (tile.grad[i] - row.delta), heads.k.piece(tile.token[i], begin));
      }
    } while (!one_tile && keys.more());
    sum.scale(scale);
    sum.store(grad_q + begin, args.head_dim - begin);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    general_queries(const WindowAttention args, int64_t first_block) {
  for_team<Shape>(
      args, args.heads, first_block,
      [&](const Place& place, int64_t head) { query_gradient<Shape>(args, place, head); },
      [&](int64_t row, int64_t head) {
        zero_row<Shape>(args, args.grad_q, args.grad_q_stride, row, head);
      });
}

// ---- (2) keys

template <class Shape>
UHD_DEVICE void key_gradients(const WindowAttention& args, const Place& place, int64_t kv_head) {
  using T = typename Shape::T;
  using S = typename Shape::S;
  const S scale = S(args.scale);
  const Head<Shape> k(args, args.k, args.k_strides, kv_head);
  const Head<Shape> v(args, args.v, args.v_strides, kv_head);
  const HeldRow<Shape> key(k, place.token), value(v, place.token);
  T* out_k = result_row<Shape>(args, args.grad_k, args.grad_kv_stride, place.token, kv_head);
  T* out_v = result_row<Shape>(args, args.grad_v, args.grad_kv_stride, place.token, kv_head);
  const int first = int(kv_head * args.group), end = first + int(args.group);
  for (int64_t begin = 0; begin < args.head_dim; begin += Shape::kSpan) {
    Piece<Shape> grad_k = Piece<Shape>::zero(), grad_v = Piece<Shape>::zero();
#pragma unroll 1
    for (int head = first; head < end; ++head) {
      const Head<Shape> q(args, args.q, args.q_strides, head);
      const Head<Shape> grad_out(args, args.grad_out, args.grad_out_strides, head);
      for (Walk queries(place.window); queries.more(); queries.advance()) {
        const int token = queries.token();
        const int row = args.window_order ? queries.position() : token;
        const Piece<Shape> query = q.piece(token, 0), grad = grad_out.piece(row, 0);
        const RowStatistics<S> softmax = statistics<S>(args, token, head);
        const S score = scale * key.dot(q, token, query);
        const S p = OnlineSoftmax<T>::weight(score, softmax.largest) * softmax.inverse_sum;
        const S grad_p = value.dot(grad_out, row, grad);
        grad_k.add(p * (grad_p - softmax.delta), begin == 0 ? query : q.piece(token, begin));
        grad_v.add(p, begin == 0 ? grad : grad_out.piece(row, begin));
      }
    }
    grad_k.scale(scale);
    grad_k.store(out_k + begin, args.head_dim - begin);
    grad_v.store(out_v + begin, args.head_dim - begin);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    general_keys(const WindowAttention args, int64_t first_block) {
  for_team<Shape>(
      args, args.kv_heads, first_block,
      [&](const Place& place, int64_t kv_head) { key_gradients<Shape>(args, place, kv_head); },
      [&](int64_t row, int64_t kv_head) {
        zero_row<Shape>(args, args.grad_k, args.grad_kv_stride, row, kv_head);
        zero_row<Shape>(args, args.grad_v, args.grad_kv_stride, row, kv_head);
      });
}

}  // namespace

namespace cuda {

int64_t general_windows_scratch(const WindowAttention& args) {
  return args.head_dim == 0 ? 0 : 3 * args.views.token_rows * args.heads;  // RowStatistics
}

const char* general_windows_backward(const WindowAttention& args, void* stream) {
  const TokenStrides q = args.q_strides, k = args.k_strides, v = args.v_strides;
  const TokenStrides grad = args.grad_out_strides;
  return with_width(
      args.dtype, args.head_dim,
      {{args.q, q.token},
       {args.q, q.head},
       {args.k, k.token},
       {args.k, k.head},
       {args.v, v.token},
       {args.v, v.head},
       {args.grad_out, grad.token},
       {args.grad_out, grad.head}},
      [&](auto element, auto width) {
        return with_shape<decltype(element), width>(args.head_dim, [&](auto shape) {
          using Shape = decltype(shape);
          const char* error = launch_teams<Shape>(general_queries<Shape>, args, args.heads, stream);
          if (error) return error;
          return launch_teams<Shape>(general_keys<Shape>, args, args.kv_heads, stream);
        });
      });
}

}  // namespace cuda
}  // namespace uhd
