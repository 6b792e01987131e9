// SPDX-License-Identifier: Apache-2.0
// Rotary embeddings of queries and keys, in the accumulation type. For *_cpu.cpp files only.
//
// With x' the channel that a channel x pairs with, the rotated channel is cos x -+ sin x': minus
// for the first of a pair. The tables have a row of angles for every token, and for every head or
// for all of them.
#pragma once
#include "window_attention/rows.h"

namespace uhd {
namespace {

// The tables at one token and head, and how the channels pair.
template <class S>
struct Angles {
  const S *cos, *sin;
  int64_t dim, parts;
};

// The sign that the sine has for each lane's channel, where neighbours pair.
template <class S, int... kLane>
inline Vec<S> neighbour_signs(std::integer_sequence<int, kLane...>) {
  return Vec<S>{(kLane % 2 == 0 ? S(-1) : S(1))...};
}

// out = x rotated by the angles, or `back` by their opposites; x may be out.
template <bool kBack, class From, class To>
void rotate(const From* x, const Angles<AccumulateT<From>>& angles, To* out) {
  using S = AccumulateT<From>;
  const S* cos = angles.cos;
  const S* sin = angles.sin;
  if (angles.parts == 0) {  // neighbours
    const Vec<S> signs = neighbour_signs<S>(std::make_integer_sequence<int, kLanes<S>>{});
    for_channels<S>(angles.dim, [&](int64_t c, auto load, auto store) {
      const Vec<S> value = load(x + c), sine = load(sin + c) * signs;
      const Vec<S> other = kBack ? exchange<S, 1>(value * sine) : exchange<S, 1>(value) * sine;
      store(out + c, value * load(cos + c) + other);
    });
    return;
  }
  const int64_t half = angles.dim / (2 * angles.parts);
  for (int64_t part = 0; part < angles.dim; part += 2 * half) {
    for_channels<S>(half, [&](int64_t i, auto load, auto store) {
      const int64_t first = part + i, second = first + half;
      const Vec<S> a = load(x + first), b = load(x + second);
      const Vec<S> sin_a = load(sin + first), sin_b = load(sin + second);
      const Vec<S> cos_a = load(cos + first), cos_b = load(cos + second);
      store(out + first, kBack ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
      store(out + second, kBack ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
    });
  }
}

// Heads of q and of k that are rotated at a time; `most` is for heads that share nothing.
struct HeadsAtOnce {
  int64_t q, k;
  HeadsAtOnce(const WindowAttention& args, int64_t most)
      : q(args.group > 1      ? args.group
          : most < args.heads ? most
                              : args.heads),
        k(args.group > 1 ? 1 : q) {}
};

// Elements of the accumulation type that rotate_heads needs for a window of so many tokens.
inline int64_t rotary_scratch(const WindowAttention& args, int64_t tokens, int64_t most) {
  const HeadsAtOnce heads(args, most);
  return 2 * tokens * (heads.q + heads.k) * args.head_dim;
}

// Every row of a window in one tensor, and in `rotated`, which has the rows of so many heads from
// `first` on side by side.
template <class T, class S, class Body>
void for_rows(const WindowAttention& args, const Window& window, T* data, TokenStrides strides,
              int64_t first, int64_t heads, S* rotated, Body&& body) {
  const int64_t dim = args.head_dim;
  const S* cos = static_cast<const S*>(args.cos);
  const S* sin = static_cast<const S*>(args.sin);
  for (int64_t i = 0; i < window.size(); ++i) {
    const int64_t token = window.token(i), angles = token * args.table_strides.token;
    for (int64_t head = first; head < first + heads; ++head, rotated += dim) {
      const int64_t at = angles + head * args.table_strides.head;
      body(data + token * strides.token + head * strides.head, rotated,
           Angles<S>{cos + at, sin + at, dim, args.rotary_parts});
    }
  }
}

// Calls body(Q{}, args, place, rest of the scratch). Without a rotary embedding once, with q and k
// as they are. Else for some heads after the others, with rotated q and k of the type Q; their
// gradients, if there are any, are rotated back.
template <class T, class Body>
void with_rotation(const WindowAttention& args, const Window& window, const Window& out_window,
                   int64_t most, AccumulateT<T>* scratch, Body&& body) {
  using S = AccumulateT<T>;
  if (args.cos == nullptr) {
    return body(T{}, args, Place{window, window, out_window, args.grad_kv_stride}, scratch);
  }
  const HeadsAtOnce each(args, most);
  const int64_t dim = args.head_dim, tokens = window.size();
  const Window dense = {0, window.cols, window.rows, window.cols, 0};
  S *q = scratch, *k = q + tokens * each.q * dim, *grad_q = k + tokens * each.k * dim,
    *grad_k = grad_q + tokens * each.q * dim, *rest = grad_k + tokens * each.k * dim;
  const auto forth = [](const T* from, S* to, const Angles<S>& by) { rotate<false>(from, by, to); };
  const auto back = [](T* to, const S* from, const Angles<S>& by) { rotate<true>(from, by, to); };
  for (int64_t head = 0, kv_head = 0; head < args.heads; head += each.q, kv_head += each.k) {
    WindowAttention part = args;
    part.heads = args.heads - head < each.q ? args.heads - head : each.q;
    part.kv_heads = part.heads / args.group;
    for_rows(args, window, static_cast<const T*>(args.q), args.q_strides, head, part.heads, q,
             forth);
    for_rows(args, window, static_cast<const T*>(args.k), args.k_strides, kv_head, part.kv_heads, k,
             forth);
    part.q = q;
    part.k = k;
    part.q_strides = {part.heads * dim, dim};
    part.k_strides = {part.kv_heads * dim, dim};
    part.v = static_cast<const T*>(args.v) + kv_head * args.v_strides.head;
    if (args.grad_out == nullptr) {
      part.out = static_cast<T*>(args.out) + head * dim;
      body(S{}, part, Place{dense, window, out_window, 0}, rest);
      continue;
    }
    part.grad_out = static_cast<const T*>(args.grad_out) + head * args.grad_out_strides.head;
    part.grad_q = grad_q;
    part.grad_k = grad_k;
    part.grad_v = static_cast<T*>(args.grad_v) + kv_head * dim;
    part.grad_q_stride = part.heads * dim;
    body(S{}, part, Place{dense, window, out_window, part.kv_heads * dim}, rest);
    for_rows(args, window, static_cast<T*>(args.grad_q), {args.grad_q_stride, dim}, head,
             part.heads, grad_q, back);
    for_rows(args, window, static_cast<T*>(args.grad_k), {args.grad_kv_stride, dim}, kv_head,
             part.kv_heads, grad_k, back);
  }
}

}  // namespace
}  // namespace uhd
