// Likelihoods: Of data above 0.
#pragma once

#include "likelihoods/term.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

// A number x > 0 whose logarithm is Gaussian, of that one's mean and log scale.
struct LogNormal {
  static constexpr const char* name = "log_normal";
  static constexpr int required = 2, params = 2;

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x) {
    const auto t = full_log_difference(p[0], x);
    const V same = lit<V>(1), inverse = select(equal(t.difference, lit<V>(0)), same, exp_(lit<V>(0) - p[1]));
    const V d = t.difference * inverse, nll = fma_(lit<V>(0.5) * d, d, t.log + p[1] + lit<V>(kHalfLog2Pi));
    // the square outgrows every logarithm
    return {select(equal(abs_(d), infinity<V>()), abs_(d), nll), {d * inverse, fma_(lit<V>(0) - d, d, lit<V>(1))}};
  }
};

// A number x > 0, of its log mean and its concentration (the shape).
struct Gamma {
  static constexpr const char* name = "gamma";
  static constexpr bool large = true;
  static constexpr int required = 2, params = 2;

  // With r = log x - l and a the concentration, nll = a h(r) + log x + (log Gamma(a) - a log a + a). Far below the mean
  // the first two are a (e^r - 1) and what is left of log x - a r = (1 - a) r + l, whose terms may cancel.
  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x) {
    const V zero = lit<V>(0), one = lit<V>(1), l = p[0], a = p[1], log_a = log_(a);
    const auto t = full_log_difference(l, x);
    const V r = zero - t.difference;
    const auto e = exp_terms(r);
    const auto low = less(r, lit<V>(-1));
    const V by_mean = select(equal(a, one), l, fma_(one - a, r, l));
    const V power = select(less(a, lit<V>(0.5)), select(equal(x, zero), by_mean, fma_(zero - a, r, t.log)), by_mean);
    const V data = select(low, fma_(a, e.em1, power), fma_(a, e.h, t.log));
    // h(r) + psi(a) - log a; of a small a, 1 / a and log x are large and near each other, and their difference comes
    // first
    const auto small = less(a, one);
    const V up = select(small, a + one, a);
    V slope = e.h, dnorm = stirling_from_one(up).slope - lit<V>(0.5) * reciprocal(up);
    if (any(small)) {
      const V inverse = one / a, shifted = l - inverse;
      const V lost = fma_(fused_(inverse, a, lit<V>(-1)), inverse, l - (shifted + inverse));
      const V apart = e.em1 + (full_log_difference(shifted, x).difference + lost);
      slope = select(small, apart, slope);
      dnorm = dnorm + select(small, log_(up * inverse), zero);
    }
    return {data + (factorial_excess(a, log_a) - log_a), {zero - a * e.em1, slope + dnorm}};
  }
};

// 0 with probability sigmoid of the last parameter, else a number above 0 of D, whose parameters come before.
template <class D>
struct ZeroOr {
  static constexpr int required = D::params + 1, params = D::params + 1;

  template <class V>
  static VF_HD Term<V, D::params + 1> eval(const V (&p)[D::params + 1], V x) {
    constexpr int n = D::params;
    const V zero = lit<V>(0), l = p[n];
    const auto none = equal(x, zero);
    V own[n];
    for (int k = 0; k < n; ++k) own[k] = p[k];
    // at 0 the density is asked at 1, and nothing of it is read
    const auto t = D::eval(own, select(none, lit<V>(1), x));
    const auto s = softplus_terms(l);
    const V rest = softplus(l, s), absent = select(less(l, zero), zero - l, zero) + s.tail;
    Term<V, n + 1> found{select(none, absent, select(equal(t.nll, infinity<V>()), t.nll, t.nll + rest)), {}};
    for (int k = 0; k < n; ++k) found.grad[k] = select(none, zero, t.grad[k]);
    found.grad[n] = select(none, zero - s.complement, select(less(zero, x), s.sigmoid, lit<V>(kNaN)));
    return found;
  }
};

struct ZeroInflatedLogNormal : ZeroOr<LogNormal> {
  static constexpr const char* name = "zero_inflated_log_normal";
};

struct ZeroInflatedGamma : ZeroOr<Gamma> {
  static constexpr const char* name = "zero_inflated_gamma";
  static constexpr bool large = true, single = true;
};

using PositiveLikelihoods = TypeList<LogNormal, Gamma, ZeroInflatedLogNormal, ZeroInflatedGamma>;

}  // namespace VF_ISA
}  // namespace vaefast
