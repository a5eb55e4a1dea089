// The likelihoods: one struct each. eval(p, x) gives the nll of x in nats and its gradient in each given parameter;
// p holds the first `required` to `params` of them, in the order of the entry in vaefast/reference.py.
// A new likelihood is a struct here, listed in Likelihoods, and that entry.
#pragma once

#include "registry.h"
#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

template <class V, int N>
struct Term {
  V nll;
  V grad[N];
};

struct Bernoulli {
  static constexpr const char* name = "bernoulli";
  static constexpr int required = 1, params = 1;

  // softplus(l) - l x = l ([l > 0] - x) + log(1 + e^-|l|): the difference is exact where it matters, so nothing cancels
  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const auto s = softplus_terms(p[0]);
    return {fma_(p[0], s.step - x, s.tail), {s.sigmoid - x}};
  }
};

struct Gaussian {
  static constexpr const char* name = "gaussian";
  static constexpr int required = 1, params = 2;
  static constexpr double kHalfLog2Pi = 0.91893853320467274178;

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const V d = p[0] - x;
    return {fma_(lit<V>(0.5) * d, d, lit<V>(kHalfLog2Pi)), {d}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x) {
    const V half = lit<V>(0.5);
    const V inverse = exp_(p[1] * lit<V>(-0.5)), d = (p[0] - x) * inverse;
    return {fma_(half, fma_(d, d, p[1]), lit<V>(kHalfLog2Pi)), {d * inverse, half * fma_(lit<V>(0) - d, d, lit<V>(1))}};
  }
};

struct Laplace {
  static constexpr const char* name = "laplace";
  static constexpr int required = 1, params = 2;
  static constexpr double kLog2 = 0.69314718055994530942;

  template <class V>
  static VF_HD V sign(V d) {
    const V zero = lit<V>(0);
    return select(less(zero, d), lit<V>(1), select(less(d, zero), lit<V>(-1), d));
  }

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const V d = p[0] - x;
    return {abs_(d) + lit<V>(kLog2), {sign(d)}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x) {
    const V inverse = exp_(lit<V>(0) - p[1]), d = p[0] - x, a = abs_(d) * inverse;
    return {a + p[1] + lit<V>(kLog2), {sign(d) * inverse, lit<V>(1) - a}};
  }
};

using Likelihoods = TypeList<Bernoulli, Gaussian, Laplace>;

}  // namespace VF_ISA
}  // namespace vaefast
