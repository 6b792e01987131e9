// SPDX-License-Identifier: Apache-2.0
// The forward pass of the general kernel: one team per token and head, keys in tiles, online
// softmax. The backward pass is in window_attention_general_backward_cuda.cu.
#include "window_attention/general_softmax.cuh"
#include "window_attention/general_windows.cuh"
#include "window_attention/general_windows.h"

namespace uhd {
namespace {

// The channels from `begin` on of the result for one query.
template <class Shape>
UHD_DEVICE Piece<Shape> attend(const DeviceWindow& window, const HeldRow<Shape>& query,
                               const Head<Shape>& k, const Head<Shape>& v, typename Shape::S scale,
                               int64_t begin) {
  using S = typename Shape::S;
  OnlineSoftmax<typename Shape::T> softmax;
  Piece<Shape> out = Piece<Shape>::zero();
  Walk keys(window);
  while (keys.more()) {
    const int count = keys.left();
    int token[Traits::kKeys];
    S weight[Traits::kKeys];
#pragma unroll
    for (int i = 0; i < Traits::kKeys; ++i, keys.advance()) {
      token[i] = keys.token();
      weight[i] = -S(INFINITY);
      if (i < count) weight[i] = scale * query.dot(k, token[i], k.piece(token[i], 0));
    }
    out.scale(softmax.add(weight));
#pragma unroll
    for (int i = 0; i < Traits::kKeys; ++i) {
      // A weight of zero would not cancel an infinite value of a token that is not there.
      if (i < count) out.add(weight[i], v.piece(token[i], begin));
    }
  }
  out.scale(S(1) / softmax.sum);
  return out;
}

template <class Shape>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    general_forward(const WindowAttention args, int64_t first_block) {
  using T = typename Shape::T;
  for_team<Shape>(
      args, args.heads, first_block,
      [&](const Place& place, int64_t head) {
        const int64_t kv_head = head / args.group;
        const Head<Shape> q(args, args.q, args.q_strides, head);
        const Head<Shape> k(args, args.k, args.k_strides, kv_head);
        const Head<Shape> v(args, args.v, args.v_strides, kv_head);
        const HeldRow<Shape> query(q, place.token);
        const int64_t row = args.window_order ? place.position : place.token;
        T* out = result_row<Shape>(args, args.out, args.heads * args.head_dim, row, head);
        for (int64_t begin = 0; begin < args.head_dim; begin += Shape::kSpan) {
          attend(place.window, query, k, v, typename Shape::S(args.scale), begin)
              .store(out + begin, args.head_dim - begin);
        }
      },
      [&](int64_t row, int64_t head) {
        zero_row<Shape>(args, args.out, args.heads * args.head_dim, row, head);
      });
}

}  // namespace

namespace cuda {

const char* general_windows_forward(const WindowAttention& args, void* stream) {
  const TokenStrides q = args.q_strides, k = args.k_strides, v = args.v_strides;
  return with_width(args.dtype, args.head_dim,
                    {{args.q, q.token},
                     {args.q, q.head},
                     {args.k, k.token},
                     {args.k, k.head},
                     {args.v, v.token},
                     {args.v, v.head}},
                    [&](auto element, auto width) {
                      return with_shape<decltype(element), width>(args.head_dim, [&](auto shape) {
                        using Shape = decltype(shape);
                        return launch_teams<Shape>(general_forward<Shape>, args, args.heads,
                                                   stream);
                      });
                    });
}

}  // namespace cuda
}  // namespace uhd
