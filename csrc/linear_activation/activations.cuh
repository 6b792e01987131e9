// SPDX-License-Identifier: Apache-2.0
// Activation functions and their derivatives, one element at a time. For *_cuda.cu files only; the
// formulas are those of activations.h, and the reasons for their form are given there.
//
// tanh.approx has no place here: its error of 2^-11 is a rounding of float16 by itself, and more
// than the result where 1 + tanh has cancelled. The sigmoid form is exact almost to the last bit of
// a float. It takes two instructions of the special function unit, one and a half where neighbours
// share a reciprocal; with two, that unit would be nearly as slow as memory in the forward pass.
#pragma once
#include <cmath>

#include "common/elements.cuh"
#include "linear_activation/linear_activation.h"

namespace uhd {
namespace {

// Exponential and reciprocal for elements of type T. The argument of the exponential is multiplied
// by kUnit already: the caller merges it with constants of his own, in double.
template <class T>
struct Arithmetic {
  using S = AccumulateT<T>;
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr double kUnit = kHalf ? 1.4426950408889634 : 1;  // 1 / log(2)

  // For half types the rounding of the argument is a relative error of |x| 2^-24: below 2^-17
  // before the result is zero.
  UHD_DEVICE static S exp(S x_times_unit) {
    if constexpr (kHalf) {
      return exp2_approximate(x_times_unit);
    } else {
      return std::exp(x_times_unit);
    }
  }
  UHD_DEVICE static S reciprocal(S x) {
    if constexpr (kHalf) {
      return reciprocal_approximate(x);
    } else {
      return S(1) / x;
    }
  }
};

// x[i] becomes 1 / x[i], of numbers that are at least one, or NaN. Two of a half type share the
// reciprocal of their product, unless it is too large for a float's normal numbers; what is not
// finite stays alone, so that it reaches no neighbour.
template <class T, int kWidth, class S = AccumulateT<T>>
UHD_DEVICE void invert(S (&x)[kWidth]) {
  if constexpr (Arithmetic<T>::kHalf && kWidth % 2 == 0) {
    S product[kWidth / 2];
    bool moderate = true;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      product[i] = x[2 * i] * x[2 * i + 1];
      moderate = moderate && product[i] <= 0x1p126f;
    }
    if (moderate) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        const S both = Arithmetic<T>::reciprocal(product[i]), first = x[2 * i];
        x[2 * i] = both * x[2 * i + 1];
        x[2 * i + 1] = both * first;
      }
      return;
    }
  }
#pragma unroll
  for (S& value : x) value = Arithmetic<T>::reciprocal(value);
}

// x sigmoid(gate(x)): the tanh form of GELU, its quick form, and SiLU.
template <class T, class Gate>
struct Gated {
  using Math = Arithmetic<T>;
  using S = typename Math::S;

  // Adds the values at x to sums.
  template <int kWidth>
  UHD_DEVICE static void add_values(S (&sums)[kWidth], const S (&x)[kWidth]) {
    S sigmoid[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sigmoid[i] = 1 + Math::exp(Gate::times(x[i], -Math::kUnit));
    invert<T>(sigmoid);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += x[i] * sigmoid[i];
  }

  // With e = exp(-gate) and s = 1 / (1 + e), 1 - s is e s to the last digits, and the derivative is
  // s + s (1 - s) x gate'. Where e would overflow it is zero: for half types because s is
  // (reciprocal_approximate), whatever the rest.
  UHD_DEVICE static S slope(S x) {
    constexpr S kLow = sizeof(S) == 8 ? Gate::kLowDouble : Gate::kLowFloat, kHigh = 64;
    if constexpr (!Math::kHalf) {
      if (x < kLow) return 0;
    }
    const S bounded = x < kLow ? kLow : x > kHigh ? kHigh : x;  // a NaN stays
    const S e = Math::exp(Gate::times(bounded, -Math::kUnit)), s = Math::reciprocal(1 + e);
    return s * (1 + e * s * Gate::x_times_slope(bounded));
  }
};

// A gate y(x) gives y times a factor, and x y'(x). It knows where y falls below -88, for float, and
// below -708: the exponentials of 88 and 708 are finite, and the reciprocal of exp(88) is
// subnormal.
template <class S, int kThousandths>
struct LinearGate {
  static constexpr double kScale = kThousandths / 1000.0;
  static constexpr double kLowFloat = -88 / kScale, kLowDouble = -708 / kScale;

  UHD_DEVICE static S times(S x, double factor) { return x * S(kScale * factor); }
  UHD_DEVICE static S x_times_slope(S x) { return x * S(kScale); }
};

template <class S>
struct CubicGate {
  static constexpr double kScale = 1.5957691216057308;  // 2 sqrt(2 / pi)
  static constexpr double kCube = kScale * 0.044715;
  static constexpr double kLowFloat = -10.03, kLowDouble = -21.14;

  UHD_DEVICE static S times(S x, double factor) {
    return (x * x * S(kCube * factor) + S(kScale * factor)) * x;
  }
  UHD_DEVICE static S x_times_slope(S x) { return (x * x * S(3 * kCube) + S(kScale)) * x; }
};

// The normal distribution: probability of a value below x, and x times the density at x.
template <class S>
struct Normal {
  S below, x_density;
};

// What its polynomial is in: t = 1 / (1 + 0.475 |x| / sqrt(2)) for half types and float.
template <class T, int kWidth, class S = AccumulateT<T>>
UHD_DEVICE void normal_argument(const S (&x)[kWidth], S (&t)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) t[i] = 1 + std::fabs(x[i]) * S(0.33587572f);
  if constexpr (sizeof(T) < 8) invert<T>(t);
}

template <class T, class S = AccumulateT<T>>
UHD_DEVICE Normal<S> normal(S x, S t) {
  // Zero where x is infinite, and so is its product with x.
  const S bell = Arithmetic<T>::exp(x * x * S(-0.5 * Arithmetic<T>::kUnit));
  const S x_density = bell > 0 ? x * bell * S(0.39894228040143268) : bell;
  if constexpr (sizeof(T) == 8) {
    return {0.5 * std::erfc(-x * 0.70710678118654752), x_density};
  } else {
    float p = -0.04808206856250763f;
    p = p * t + 0.26686200499534607f;
    p = p * t - 0.5442104339599609f;
    p = p * t + 0.4248825907707214f;
    p = p * t - 0.0996016934514045f;
    p = p * t + 0.23607876896858215f;
    p = p * t + 0.22705553472042084f;
    p = p * t + 0.26907166838645935f;
    p = p * t + 0.26794368028640747f;
    const float tail = p * t * bell * 0.5f;
    return {x < 0 ? tail : 1 - tail, x_density};
  }
}

// ---- the values and slope(x), the derivative, of each function

template <class T>
using GeluTanh = Gated<T, CubicGate<AccumulateT<T>>>;

template <class T>
struct Gelu {
  using S = AccumulateT<T>;
  template <int kWidth>
  UHD_DEVICE static void add_values(S (&sums)[kWidth], const S (&x)[kWidth]) {
    S t[kWidth];
    normal_argument<T>(x, t);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += x[i] * normal<T>(x[i], t[i]).below;
  }
  UHD_DEVICE static S slope(S x) {
    S argument[1] = {x}, t[1];
    normal_argument<T>(argument, t);
    const Normal<S> n = normal<T>(x, t[0]);
    return n.below + n.x_density;
  }
};

template <class T>
using QuickGelu = Gated<T, LinearGate<AccumulateT<T>, 1702>>;

template <class T>
using Silu = Gated<T, LinearGate<AccumulateT<T>, 1000>>;

template <class T>
struct Relu {
  using S = AccumulateT<T>;
  template <int kWidth>
  UHD_DEVICE static void add_values(S (&sums)[kWidth], const S (&x)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] += x[i] < 0 ? S(0) : x[i];  // a NaN stays
  }
  UHD_DEVICE static S slope(S x) { return x > 0 ? S(1) : S(0); }
};

// Calls function with the activation for elements of type T; returns what it does.
template <class T, class Function>
inline const char* dispatch_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kGeluTanh:
      return function(GeluTanh<T>{});
    case Activation::kGelu:
      return function(Gelu<T>{});
    case Activation::kQuickGelu:
      return function(QuickGelu<T>{});
    case Activation::kSilu:
      return function(Silu<T>{});
    case Activation::kRelu:
      return function(Relu<T>{});
  }
  return "unknown activation";
}

}  // namespace
}  // namespace uhd
