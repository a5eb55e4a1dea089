// Likelihoods: Of data in [0, 1].
#pragma once

#include "likelihoods/term.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

struct Bernoulli {
  static constexpr const char* name = "bernoulli";
  static constexpr int required = 1, params = 1;

  // softplus(l) - l x = l ([l > 0] - x) + log(1 + e^-|l|): the difference is exact where it matters, so nothing cancels
  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const auto s = softplus_terms(p[0]);
    // 0 of an infinite logit leaves nothing
    return {select(equal(s.step, x), s.tail, fma_(p[0], s.step - x, s.tail)), {s.sigmoid - x}};
  }
};

// Of probabilities, as F.binary_cross_entropy computes it: logarithms no lower than -100, and p (1 - p) no less than
// 1e-12 where the gradient divides by it.
struct BernoulliProbs {
  static constexpr const char* name = "bernoulli_probs";
  static constexpr int required = 1, params = 1;

  template <class V>
  static VF_HD V log_of(V p) {
    const V log = log_(p), least = lit<V>(-100);
    return select(less(log, least), least, log);
  }

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const V one = lit<V>(1), least = lit<V>(1e-12), rest = one - p[0], variance = p[0] * rest;
    const V datum = in_unit(x);
    const V nll = lit<V>(0) - fma_(datum, log_of(p[0]), (one - datum) * log_of(rest));
    return {nll, {(p[0] - datum) / select(less(variance, least), least, variance)}};
  }
};

// Loaiza-Ganem & Cunningham 2019: the Bernoulli's density on [0, 1] normalised, p(x) = l e^(l x) / (e^l - 1).
struct ContinuousBernoulli {
  static constexpr const char* name = "continuous_bernoulli";
  static constexpr int required = 1, params = 1;

  // With a = |l| and m = 1 - e^-a: log((e^l - 1) / l) = l [l > 0] + log(m / a), and the mean is h(-a) / (a m) or what
  // that leaves to 1.
  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x) {
    const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(0.5), l = p[0], a = abs_(l);
    const auto e = exp_terms(zero - a);
    const auto positive = less(zero, l), tiny = less(a, lit<V>(1e-4));
    V slope = lit<V>(-0.5);  // of the series of m / a
    if constexpr (kDouble<V>) slope = fma_(a, fma_(a, lit<V>(-1.0 / 24), lit<V>(1.0 / 6)), slope);
    const V m = zero - e.em1, ratio = select(tiny, fma_(a, slope, one), m / a);
    const V upper = e.h / (a * m), mean = select(positive, upper, one - upper);
    const V step = select(positive, one, zero), datum = in_unit(x), rest = step - datum;
    // at infinity all mass is at one end
    const auto ends = equal(a, infinity<V>());
    const V nll = select(ends, select(equal(rest, zero), zero - a, a + rest), fma_(l, rest, log_(ratio)));
    return {nll, {select(tiny, fma_(l, lit<V>(1.0 / 12), half), select(ends, step, mean)) - datum}};
  }
};

using BinaryLikelihoods = TypeList<Bernoulli, BernoulliProbs, ContinuousBernoulli>;

}  // namespace VF_ISA
}  // namespace vaefast
