// SPDX-License-Identifier: Apache-2.0
// Activation functions and their derivatives, a vector at a time. For *_cpu.cpp files only.
#pragma once
#include "common/vec.h"
#include "linear_activation/linear_activation.h"

namespace uhd {
namespace {

template <class V>
inline V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// x sigmoid(gate(x)), of which three of the functions are special cases. Written so, the tanh form
// of GELU, 0.5 x (1 + tanh(y)) = x sigmoid(2 y), loses no digits where tanh(y) is near -1.
template <class V, class Gate>
inline V gated(V x, Gate gate) {
  return x * sigmoid(gate.at(x));
}
template <class V, class Gate>
inline V gated_slope(V x, Gate gate) {
  // With e = exp(-|y|), sigmoid'(y) = e / (1 + e)^2: s (1 - s) would lose the digits of 1 - s.
  const V y = gate.at(x), e = exp(y < 0 ? y : -y), r = 1 / (1 + e);
  // e is zero long before 1000; without the bound, its product with infinity would be NaN.
  const V bounded = x > 1000 ? V{} + 1000 : x < -1000 ? V{} - 1000 : x;
  return (y < 0 ? e * r : r) + e * r * r * gate.x_times_slope(bounded);
}

template <class S>
struct LinearGate {
  S scale;
  Vec<S> at(Vec<S> x) const { return x * scale; }
  Vec<S> x_times_slope(Vec<S> x) const { return x * scale; }
};

template <class S>
struct CubicGate {
  static constexpr S kScale = S(1.5957691216057308);  // 2 sqrt(2 / pi)
  static constexpr S kCube = S(0.044715);
  Vec<S> at(Vec<S> x) const { return (x * x * kCube + 1) * x * kScale; }
  Vec<S> x_times_slope(Vec<S> x) const { return (x * x * (3 * kCube) + 1) * x * kScale; }
};

// The normal distribution: probability of a value below x, and x times the density at x.
template <class S>
struct Normal {
  Vec<S> below, x_density;
};

inline Normal<double> normal(Vec<double> x) {
  Normal<double> result{};
  for (int i = 0; i < kLanes<double>; ++i) {
    result.below[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752);
    const double bell = std::exp(-0.5 * x[i] * x[i]);  // zero where x is infinite
    result.x_density[i] = bell > 0 ? x[i] * bell * 0.39894228040143268 : bell;
  }
  return result;
}

// erfc(y) = t p(t) exp(-y^2) for y >= 0, with t = 1 / (1 + 0.475 y) and p a minimax polynomial of
// degree 8, relative error 4e-8 before rounding. Below the mean the result is relatively exact too.
inline Normal<float> normal(Vec<float> x) {
  const Vec<float> size = x < 0 ? -x : x;
  const Vec<float> t = 1 / (1 + size * 0.33587572f);  // 0.475 / sqrt(2)
  Vec<float> p = splat(-0.04808206856250763f);
  p = p * t + 0.26686200499534607f;
  p = p * t - 0.5442104339599609f;
  p = p * t + 0.4248825907707214f;
  p = p * t - 0.0996016934514045f;
  p = p * t + 0.23607876896858215f;
  p = p * t + 0.22705553472042084f;
  p = p * t + 0.26907166838645935f;
  p = p * t + 0.26794368028640747f;
  const Vec<float> bell = exp(x * x * -0.5f), tail = p * t * bell * 0.5f;
  // bell is zero where x is infinite, and their product should be.
  const Vec<float> x_density = bell > 0 ? x * bell * 0.39894228f : bell;
  return {x < 0 ? tail : 1 - tail, x_density};
}

// ---- value(x) and slope(x), the derivative, of each function

struct GeluTanh {
  template <class S>
  static Vec<S> value(Vec<S> x) {
    return gated(x, CubicGate<S>{});
  }
  template <class S>
  static Vec<S> slope(Vec<S> x) {
    return gated_slope(x, CubicGate<S>{});
  }
};

struct Gelu {
  template <class S>
  static Vec<S> value(Vec<S> x) {
    return x * normal(x).below;
  }
  template <class S>
  static Vec<S> slope(Vec<S> x) {
    const Normal<S> n = normal(x);
    return n.below + n.x_density;
  }
};

struct QuickGelu {
  template <class S>
  static Vec<S> value(Vec<S> x) {
    return gated(x, LinearGate<S>{S(1.702)});
  }
  template <class S>
  static Vec<S> slope(Vec<S> x) {
    return gated_slope(x, LinearGate<S>{S(1.702)});
  }
};

struct Silu {
  template <class S>
  static Vec<S> value(Vec<S> x) {
    return gated(x, LinearGate<S>{S(1)});
  }
  template <class S>
  static Vec<S> slope(Vec<S> x) {
    return gated_slope(x, LinearGate<S>{S(1)});
  }
};

struct Relu {
  template <class S>
  static Vec<S> value(Vec<S> x) {
    return x < 0 ? Vec<S>{} : x;  // a NaN stays
  }
  template <class S>
  static Vec<S> slope(Vec<S> x) {
    return x > 0 ? splat(S(1)) : Vec<S>{};
  }
};

template <class Function>
inline void dispatch_activation(Activation activation, Function&& function) {
  switch (activation) {
    case Activation::kGeluTanh:
      return function(GeluTanh{});
    case Activation::kGelu:
      return function(Gelu{});
    case Activation::kQuickGelu:
      return function(QuickGelu{});
    case Activation::kSilu:
      return function(Silu{});
    case Activation::kRelu:
      return function(Relu{});
  }
}

}  // namespace
}  // namespace uhd
