// SPDX-License-Identifier: Apache-2.0
// Vectors run along the channels. The weights of a 2 x 2 window stay in registers; those of other
// windows, larger or ragged, are computed again where they are needed.
#include "common/blocked_sum.h"
#include "common/vec.h"
#include "window_pool/window_pool.h"

namespace uhd {
namespace UHD_ISA {
namespace {

// The rows of a tensor that belong to the tokens of a window.
template <class T>
struct Tokens {
  T* first;
  int64_t rows, cols, down, across;

  Tokens(T* tensor, int64_t stride, const Window& window)
      : first(tensor + window.first * stride),
        rows(window.rows),
        cols(window.cols),
        down(window.row_stride * stride),
        across(stride) {}

  T* at(int64_t row, int64_t col) const { return first + row * down + col * across; }
};

template <class T>
struct Inputs {
  Tokens<const T> x, logits;

  Inputs(const WindowPool& args, const Window& window)
      : x(static_cast<const T*>(args.x), args.x_stride, window),
        logits(static_cast<const T*>(args.logits), args.logits_stride, window) {}
};

template <class T>
struct Gradients {
  Tokens<T> x, logits;

  Gradients(const WindowPool& args, const Window& window)
      : x(static_cast<T*>(args.grad_x), args.channels, window),
        logits(static_cast<T*>(args.grad_logits), args.channels, window) {}
};

// Of a logit, from the gradient of its token. A token alone in its window has a gradient of +0,
// whatever the signs, as in any sum of gradients: hence the addition, which is part of an FMA.
template <class S>
inline Vec<S> logit_gradient(Vec<S> grad_token, Vec<S> token, Vec<S> pooled) {
  return grad_token * (token - pooled) + S(0);
}

// ---- 2 x 2 windows

template <class S>
struct Weights {
  Vec<S> at[4], sum;

  // Of logits a, b, c, d. A NaN or +inf among them leaves no weight that is not NaN.
  Weights(Vec<S> a, Vec<S> b, Vec<S> c, Vec<S> d) {
    constexpr S scale = pool_scale<S>(4);
    const Vec<S> largest = max<S>(max<S>(a, b), max<S>(c, d));
    at[0] = exp(a - largest) * scale;
    at[1] = exp(b - largest) * scale;
    at[2] = exp(c - largest) * scale;
    at[3] = exp(d - largest) * scale;
    sum = at[0] + at[1] + at[2] + at[3];
  }
  Vec<S> total(Vec<S> a, Vec<S> b, Vec<S> c, Vec<S> d) const {
    return at[0] * a + at[1] * b + at[2] * c + at[3] * d;
  }
};

template <class T>
void forward_2x2(const WindowPool& args, const Window& window, T* out) {
  using S = AccumulateT<T>;
  const Inputs<T> in(args, window);
  for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
    const Weights<S> weights(load(in.logits.at(0, 0) + c), load(in.logits.at(0, 1) + c),
                             load(in.logits.at(1, 0) + c), load(in.logits.at(1, 1) + c));
    const Vec<S> total = weights.total(load(in.x.at(0, 0) + c), load(in.x.at(0, 1) + c),
                                       load(in.x.at(1, 0) + c), load(in.x.at(1, 1) + c));
    store(out + c, total / weights.sum);
  });
}

template <class T>
void backward_2x2(const WindowPool& args, const Window& window, const T* grad_out) {
  using S = AccumulateT<T>;
  const Inputs<T> in(args, window);
  const Gradients<T> grads(args, window);
  for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
    const Weights<S> weights(load(in.logits.at(0, 0) + c), load(in.logits.at(0, 1) + c),
                             load(in.logits.at(1, 0) + c), load(in.logits.at(1, 1) + c));
    const Vec<S> token[4] = {load(in.x.at(0, 0) + c), load(in.x.at(0, 1) + c),
                             load(in.x.at(1, 0) + c), load(in.x.at(1, 1) + c)};
    const Vec<S> inverse = S(1) / weights.sum;
    const Vec<S> pooled = weights.total(token[0], token[1], token[2], token[3]) * inverse;
    const Vec<S> share = load(grad_out + c) * inverse;
    for (int i = 0; i < 4; ++i) {
      const Vec<S> grad = weights.at[i] * share;
      store(grads.x.at(i / 2, i % 2) + c, grad);
      store(grads.logits.at(i / 2, i % 2) + c, logit_gradient<S>(grad, token[i], pooled));
    }
  });
}

// ---- other windows

// Of some or all tokens of a window: the sum of the weights, and that of the weighted tokens.
template <class S>
struct Sums {
  Vec<S> weights, tokens;
  Sums& operator+=(const Sums& other) {
    weights += other.weights;
    tokens += other.tokens;
    return *this;
  }
};

template <class S>
struct Pooled {
  Vec<S> largest, sum, total;  // largest logit, sum of the weights, sum of the weighted tokens
};

template <class T, class Load, class S = AccumulateT<T>>
inline Pooled<S> pool_any(const Inputs<T>& in, S scale, int64_t c, Load load) {
  const auto& [x, logits] = in;
  Vec<S> largest = load(logits.first + c);
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t col = 0; col < x.cols; ++col) {
      largest = max<S>(load(logits.at(row, col) + c), largest);
    }
  }
  BlockedSum<Sums<S>> sums;
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t col = 0; col < x.cols; ++col) {
      const Vec<S> weight = exp(load(logits.at(row, col) + c) - largest) * scale;
      sums.add({weight, weight * load(x.at(row, col) + c)});
    }
  }
  const Sums<S> all = sums.total();
  return {largest, all.weights, all.tokens};
}

template <class T>
void forward_any(const WindowPool& args, const Window& window, T* out) {
  using S = AccumulateT<T>;
  const Inputs<T> in(args, window);
  const S scale = pool_scale<S>(window.size());
  for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
    const Pooled<S> pooled = pool_any<T>(in, scale, c, load);
    store(out + c, pooled.total / pooled.sum);
  });
}

template <class T>
void backward_any(const WindowPool& args, const Window& window, const T* grad_out) {
  using S = AccumulateT<T>;
  const Inputs<T> in(args, window);
  const Gradients<T> grads(args, window);
  const S scale = pool_scale<S>(window.size());
  for_channels<T>(args.channels, [&](int64_t c, auto load, auto store) {
    const auto [largest, sum, total] = pool_any<T>(in, scale, c, load);
    const Vec<S> inverse = S(1) / sum, pooled = total * inverse;
    const Vec<S> share = load(grad_out + c) * inverse;
    for (int64_t row = 0; row < in.x.rows; ++row) {
      for (int64_t col = 0; col < in.x.cols; ++col) {
        const Vec<S> grad = exp(load(in.logits.at(row, col) + c) - largest) * scale * share;
        store(grads.x.at(row, col) + c, grad);
        const Vec<S> token = load(in.x.at(row, col) + c);
        store(grads.logits.at(row, col) + c, logit_gradient<S>(grad, token, pooled));
      }
    }
  });
}

// Calls full or any with every window of the range and its number.
template <class Full, class Any>
void for_windows(const ViewTable& views, int64_t begin, int64_t end, Full&& full, Any&& any) {
  WindowCursor cursor(views, begin);
  for (int64_t i = begin; i < end; ++i) {
    const Window window = cursor.next();
    window.rows == 2 && window.cols == 2 ? full(window, i) : any(window, i);
  }
}

}  // namespace

void window_pool_forward(const WindowPool& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto out = [&](int64_t i) { return static_cast<T*>(args.out) + i * args.channels; };
    for_windows(
        args.views, begin, end,
        [&](const Window& window, int64_t i) { forward_2x2<T>(args, window, out(i)); },
        [&](const Window& window, int64_t i) { forward_any<T>(args, window, out(i)); });
  });
}

void window_pool_backward(const WindowPool& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const auto grad_out = [&](int64_t i) {
      return static_cast<const T*>(args.grad_out) + i * args.grad_out_stride;
    };
    for_windows(
        args.views, begin, end,
        [&](const Window& window, int64_t i) { backward_2x2<T>(args, window, grad_out(i)); },
        [&](const Window& window, int64_t i) { backward_any<T>(args, window, grad_out(i)); });
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
