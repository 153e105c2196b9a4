// Activations of vectors (vectors.h), with the same bits in every instruction set; a NaN stays one.
#pragma once

#include <cstdint>
#include <limits>

#include "activation.h"
#include "vectors.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// The part of an activation that bounds its values: sums are stored through it. What is left is a pass of its own.
struct Bounds {
  Vector least, most;
};
KERNEL Bounds bounds_of(Activation activation) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const bool positive = activation == Activation::relu || activation == Activation::relu6;
  return {broadcast(positive ? 0.f : -infinity), broadcast(activation == Activation::relu6 ? 6.f : infinity)};
}
KERNEL Vector bound(const Bounds& bounds, Vector v) { return at_most(bounds.most, at_least(bounds.least, v)); }
KERNEL bool is_bound(Activation activation) { return activation <= Activation::relu6; }

// e^v, within two units of the last place, for v cut to the range whose results are ordinary numbers (Cody and Waite;
// the polynomial is that of Cephes).
KERNEL Vector exponential(Vector v) {
  v = at_most(broadcast(88.f), at_least(broadcast(-87.f), v));
  const Vector n = nearest(multiply(v, broadcast(1.44269504f)));
  const Vector r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), v));
  Vector p = broadcast(1.9875691500e-4f);
  UNROLL for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                  5.0000001201e-1f}) p = fma(p, r, broadcast(next));
  return multiply(fma(multiply(r, r), p, add(r, broadcast(1.f))), power_of_two(n));
}

// 1 + e^-v
KERNEL Vector logistic(Vector v) { return add(broadcast(1.f), exponential(multiply(v, broadcast(-1.f)))); }

// min(max(v + 3, 0), 6)
KERNEL Vector six_of(Vector v) { return at_most(broadcast(6.f), at_least(zeros(), add(v, broadcast(3.f)))); }

// The error function, to 3e-7, and 1 where it rounds to that (the rational function of Eigen).
KERNEL Vector error_function(Vector v) {
  v = at_most(broadcast(3.832506856900711f), at_least(broadcast(-3.832506856900711f), v));
  const Vector square = multiply(v, v);
  Vector over = broadcast(0.00022905065861350646f), under = broadcast(-1.1791602954361697e-7f);
  UNROLL for (const float next : {0.0034082910107109506f, 0.050955695062380861f, 0.18520832239976145f,
                                  1.128379143519084f}) over = fma(over, square, broadcast(next));
  UNROLL for (const float next : {0.000023547966471313185f, 0.0010179625278914885f, 0.014070470171167667f,
                                  0.11098505178285362f, 0.49746925110067538f, 1.0f}) under =
      fma(under, square, broadcast(next));
  return divide(multiply(v, over), under);
}

template <Activation activation>
KERNEL Vector activated(Vector v) {
  if constexpr (activation == Activation::silu) return divide(v, logistic(v));
  if constexpr (activation == Activation::hardswish) return multiply(multiply(v, six_of(v)), broadcast(1.f / 6.f));
  if constexpr (activation == Activation::gelu) {
    const Vector half = multiply(v, broadcast(0.5f));
    return fma(half, error_function(multiply(v, broadcast(0.70710678f))), half);
  }
  if constexpr (activation == Activation::sigmoid) return divide(broadcast(1.f), logistic(v));
  if constexpr (activation == Activation::hardsigmoid) return multiply(six_of(v), broadcast(1.f / 6.f));
  if constexpr (activation == Activation::relu6) return at_most(broadcast(6.f), relu(v));
  if constexpr (activation == Activation::relu) return relu(v);
  return v;
}

// `count` vectors that lie side by side, in place.
template <Activation activation>
void activate_as(float* at, int64_t count) {
  for (float* end = at + count * 16; at != end; at += 16) store16(at, activated<activation>(load16(at)));
}

// The activation of `count` vectors that lie side by side, in place.
inline void activate(Activation activation, float* at, int64_t count) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return activate_as<Activation::relu>(at, count);
    case Activation::relu6:
      return activate_as<Activation::relu6>(at, count);
    case Activation::silu:
      return activate_as<Activation::silu>(at, count);
    case Activation::hardswish:
      return activate_as<Activation::hardswish>(at, count);
    case Activation::gelu:
      return activate_as<Activation::gelu>(at, count);
    case Activation::sigmoid:
      return activate_as<Activation::sigmoid>(at, count);
    case Activation::hardsigmoid:
      return activate_as<Activation::hardsigmoid>(at, count);
  }
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
