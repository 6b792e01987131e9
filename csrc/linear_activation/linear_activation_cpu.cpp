// SPDX-License-Identifier: Apache-2.0
// Vectors run along the outputs of the layer.
#include "common/blocked_sum.h"
#include "common/sums.h"
#include "common/vec.h"
#include "linear_activation/activations.h"
#include "linear_activation/linear_activation.h"

namespace uhd {
namespace UHD_ISA {
namespace {

template <class Function, class T>
void forward_row(const LinearActivation& args, const T* u, T* h) {
  using S = AccumulateT<T>;
  const T* bias = static_cast<const T*>(args.bias);
  for_channels<T>(args.width, [&](int64_t c, auto load, auto store) {
    const Vec<S> shift = bias ? load(bias + c) : Vec<S>{};
    BlockedSum<Vec<S>> sum;
    for (int64_t i = 0; i < args.group; ++i) {
      sum.add(Function::template value<S>(load(u + i * args.width + c) + shift));
    }
    store(h + c, sum.total() / static_cast<S>(args.group));
  });
}

template <class Function, class T, class S = AccumulateT<T>>
void backward_row(const LinearActivation& args, const T* grad_h, const T* u, T* grad_u,
                  S* partial) {
  const T* bias = static_cast<const T*>(args.bias);
  for_channels<T>(args.width, [&](int64_t c, auto load, auto store) {
    const Vec<S> shift = bias ? load(bias + c) : Vec<S>{};
    const Vec<S> share = load(grad_h + c) / static_cast<S>(args.group);
    BlockedSum<Vec<S>> sum;
    for (int64_t i = 0; i < args.group; ++i) {
      const int64_t at = i * args.width + c;
      const Vec<S> grad = share * Function::template slope<S>(load(u + at) + shift);
      store(grad_u + at, grad);
      sum.add(grad);
    }
    if (partial) store(partial + c, load(partial + c) + sum.total());
  });
}

template <class Function, class T>
void backward_block(const LinearActivation& args, int64_t block) {
  using S = AccumulateT<T>;
  const int64_t begin = block * args.rows_per_block(), last = begin + args.rows_per_block();
  const int64_t products = args.group * args.width;
  S* partial = args.partials ? static_cast<S*>(args.partials) + block * args.width : nullptr;
  if (partial) std::memset(partial, 0, static_cast<size_t>(args.width) * sizeof(S));
  for (int64_t row = begin; row < (last < args.rows ? last : args.rows); ++row) {
    backward_row<Function, T>(args, static_cast<const T*>(args.grad_h) + row * args.grad_h_stride,
                              static_cast<const T*>(args.u) + row * products,
                              static_cast<T*>(args.grad_u) + row * products, partial);
  }
}

}  // namespace

void linear_activation_forward(const LinearActivation& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_activation(args.activation, [&](auto function) {
      for (int64_t row = begin; row < end; ++row) {
        forward_row<decltype(function), T>(
            args, static_cast<const T*>(args.u) + row * args.group * args.width,
            static_cast<T*>(args.h) + row * args.width);
      }
    });
  });
}

void linear_activation_backward(const LinearActivation& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    dispatch_activation(args.activation, [&](auto function) {
      for (int64_t block = begin; block < end; ++block) {
        backward_block<decltype(function), decltype(element)>(args, block);
      }
    });
  });
}

void linear_activation_sum_partials(const LinearActivation& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto element) {
    using S = AccumulateT<decltype(element)>;
    sum_strided<S>(static_cast<const S*>(args.partials) + begin, args.width, args.blocks(), S(1),
                   end - begin, static_cast<S*>(args.grad_bias) + begin);
  });
}

}  // namespace UHD_ISA
}  // namespace uhd
