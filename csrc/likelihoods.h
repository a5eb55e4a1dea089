// The likelihoods: one struct each. eval(p, x) gives the nll of x in nats and its gradient in each given parameter;
// p holds the first `required` to `params` of them, in the order of the entry in vaefast/likelihoods.py. One that has
// options, `options` numbers in that entry's order, takes them third: eval(p, x, o).
// Those with Channels are mixtures (mixture.h), whose last option is the dimension along which their planes lie; the
// one before it, if a target has any, the number of channels.
// A new likelihood is a struct here, listed in Likelihoods, and that entry.
#pragma once

#include "mixture.h"
#include "registry.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

template <class V, int N>
struct Term {
  V nll;
  V grad[N];
};

template <class L, class = void>
constexpr int kOptions = 0;
template <class L>
constexpr int kOptions<L, std::void_t<decltype(L::options)>> = L::options;

template <class L, class V, int N>
VF_HD auto eval_term(const V (&p)[N], V x, const Options& o) {
  if constexpr (kOptions<L> > 0) {
    return L::eval(p, x, o);
  } else {
    return L::eval(p, x);
  }
}

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

// Its option is 1 where the constant is in, else 0.
struct Gaussian {
  static constexpr const char* name = "gaussian";
  static constexpr int required = 1, params = 2, options = 1;

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V d = p[0] - x;
    return {fma_(lit<V>(0.5) * d, d, lit<V>(kHalfLog2Pi) * lit<V>(o[0])), {d}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    const V half = lit<V>(0.5), one = lit<V>(1), constant = lit<V>(kHalfLog2Pi) * lit<V>(o[0]), off = p[0] - x;
    // of a variance that vanishes nothing is left at the mean, and all beside it
    const V inverse = select(equal(off, lit<V>(0)), one, exp_(p[1] * lit<V>(-0.5))), d = off * inverse;
    const V twice = select(less(abs_(d), infinity<V>()), fma_(d, d, p[1]), abs_(d));
    return {fma_(half, twice, constant), {d * inverse, half * fma_(lit<V>(0) - d, d, one)}};
  }
};

struct Laplace {
  static constexpr const char* name = "laplace";
  static constexpr int required = 1, params = 2, options = 1;  // as Gaussian's

  template <class V>
  static VF_HD V sign(V d) {
    const V zero = lit<V>(0);
    return select(less(zero, d), lit<V>(1), select(less(d, zero), lit<V>(-1), d));
  }

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V d = p[0] - x;
    return {abs_(d) + lit<V>(kLog2) * lit<V>(o[0]), {sign(d)}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    const V d = p[0] - x, inverse = select(equal(d, lit<V>(0)), lit<V>(1), exp_(lit<V>(0) - p[1])),
            a = abs_(d) * inverse;
    const V scaled = select(less(a, infinity<V>()), a + p[1], a);
    return {scaled + lit<V>(kLog2) * lit<V>(o[0]), {sign(d) * inverse, lit<V>(1) - a}};
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
    const V m = zero - e.em1, ratio = select(tiny, fma_(a, lit<V>(-0.5), one), m / a);
    const V upper = e.h / (a * m), mean = select(positive, upper, one - upper);
    const V step = select(positive, one, zero), datum = in_unit(x), rest = step - datum;
    // at infinity all mass is at one end
    const auto ends = equal(a, infinity<V>());
    const V nll = select(ends, select(equal(rest, zero), zero - a, a + rest), fma_(l, rest, log_(ratio)));
    return {nll, {select(tiny, fma_(l, lit<V>(1.0 / 12), half), select(ends, step, mean)) - datum}};
  }
};

struct StudentT {
  static constexpr const char* name = "student_t";
  static constexpr int required = 3, params = 3;  // df = p[2]

  // With a = df / 2 and b = a + 1/2, log Gamma(a) - log Gamma(b) + log(a) / 2 = 1/2 - a log(b / a) + S(a) - S(b). Of
  // q = d^2 / df, which may overflow, the smaller of q and 1 / q is added to 1. From df = 1e30 on it is a Gaussian.
  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x) {
    const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(0.5), infinite = infinity<V>();
    const V df = at_most(p[2], lit<V>(1e30)), a = half * df, b = a + half, off = p[0] - x;
    const V inverse = select(equal(off, zero), one, exp_(zero - p[1])), d = off * inverse, q = d * (d / df);
    const auto near = less_equal(q, one), huge = less(lit<V>(1e30), q);
    const V shrunk = select(huge, d * lit<V>(0x1p-40), d);
    V log_q = log_(shrunk * (shrunk / df)) + select(huge, lit<V>(80 * kLog2Head + 80 * kLog2Tail), zero);
    const auto vanishing = equal(abs_(d), infinite);
    if (any(vanishing)) log_q = select(vanishing, lit<V>(2) * (log_(abs_(off)) - p[1]) - log_(df), log_q);
    const V square = select(near, q, one / q), rest = one / (one + square);
    const V tail = twice_atanh(square / (square + lit<V>(2))) + select(near, zero, log_q);
    const V pull = (df + one) * select(near, square * rest, rest);  // the nll's slope in log |d|
    const V slope = select(near, (df + one) / df * d * rest * inverse, pull / off);
    const V ratio = select(less_equal(half, a), twice_atanh(half / (a + b)), log_(b / a));
    const auto at_a = stirling(a), at_b = stirling(b);
    const V norm = fma_(zero - a, ratio, lit<V>(0.5 + kHalfLog2Pi)) + (at_a.value - at_b.value);
    const V dnorm = half / b - ratio + (at_a.slope - at_b.slope);
    const V nll = select(equal(tail, infinite), tail, fma_(b, tail, norm + p[1]));
    return {nll, {slope, one - pull, half * (dnorm + tail - pull / df)}};
  }
};

// A count, of a log rate. With `constant` (its option), log(x!) is in.
struct Poisson {
  static constexpr const char* name = "poisson";
  static constexpr int required = 1, params = 1, options = 1;

  // e^l - x l + log(x!) = x h(d) + (log(x!) - x log x + x) with d = l - log x, where large terms cancel on paper
  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V l = p[0], zero = lit<V>(0);
    const auto none = equal(x, zero);
    const V count = select(none, lit<V>(1), count_of(x));
    const auto log = log_difference(l, count);
    const auto e = exp_terms(select(none, l, log.difference));
    const V rate = e.root * e.root;
    const V data = o[0].narrow != 0 ? factorial_excess(count, log.log) : fma_(zero - count, log.log, count);
    const V nll = fma_(count, e.h, data);
    return {select(none, rate, nll), {select(none, rate, count * e.em1)}};
  }
};

// A count, of its mean and inverse dispersion. Options: `constant` as for Poisson, and `eps`, which is added to the
// mean.
struct NegativeBinomial {
  static constexpr const char* name = "negative_binomial";
  static constexpr int required = 2, params = 2, options = 2;

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    const auto t = negative_binomial(p[0], lit<V>(o[1]), p[1], count_of(x), o[0].narrow != 0);
    return {t.nll, {t.dmu, t.dtheta}};
  }
};

// The same, but 0 with probability sigmoid(p[2]) whatever the rest says (scvi-tools' dropout logits).
struct ZeroInflatedNegativeBinomial {
  static constexpr const char* name = "zero_inflated_negative_binomial";
  static constexpr int required = 3, params = 3, options = 2;

  // At 0, with n the negative binomial's nll: softplus(-l) - softplus(-n - l) = min(n, max(-l, 0)) + tails; its
  // gradient reaches n with weight sigmoid(-n - l). Elsewhere softplus(l) + n.
  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x, const Options& o) {
    const V zero = lit<V>(0), one = lit<V>(1), l = p[2];
    const auto t = negative_binomial(p[0], lit<V>(o[1]), p[1], count_of(x), o[0].narrow != 0);
    const auto dropout = softplus_terms(l), kept = softplus_terms(zero - t.nll - l);
    const V most = select(less(l, zero), zero - l, zero), least = select(less(t.nll, most), t.nll, most);
    const auto none = equal(x, zero);
    const V weight = select(none, kept.sigmoid, one);
    return {select(none, least + dropout.tail - kept.tail, softplus(l, dropout) + t.nll),
            {t.dmu * weight, t.dtheta * weight, select(none, kept.sigmoid - dropout.complement, dropout.sigmoid)}};
  }
};

// A logistic distribution's mass on the bin around x, the outer bins open (Salimans et al. 2017, equation 2). Options:
// the number of bins, the lowest and the highest x, and the least log scale.
struct DiscretizedLogistic {
  static constexpr const char* name = "discretized_logistic";
  static constexpr int required = 2, params = 2, options = 4;

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    return of(x - p[0], p[1], x, o);
  }

  // c = x - mean. sigmoid(b) - sigmoid(a) = (1 - e^(a - b)) / ((1 + e^a) (1 + e^-b))
  template <class V>
  static VF_HD Term<V, 2> of(V c, V log_scale, V x, const Options& o) {
    const V zero = lit<V>(0), one = lit<V>(1), least = lit<V>(o[3]), lo = lit<V>(o[1]), hi = lit<V>(o[2]);
    const V half = (hi - lo) * lit<V>(0.5) / (lit<V>(o[0]) - one);  // of a bin's width
    const auto floored = less_equal(log_scale, least);
    const V inverse = exp_(zero - select(floored, least, log_scale)), w = half * inverse;
    const auto a = softplus_terms((c - half) * inverse), b = softplus_terms((zero - c - half) * inverse);
    const auto low = less(x, fma_(half, lit<V>(0.5), lo)), high = less(hi - half * lit<V>(0.5), x);
    const V a_nll = softplus((c - half) * inverse, a), b_nll = softplus((zero - c - half) * inverse, b);
    const auto mass = exp_terms(lit<V>(-2) * w);
    const V nll = a_nll + b_nll - log_(zero - mass.em1);
    // sigmoid(a) - sigmoid(-b), from the larger one down
    const auto right = less(zero, c);
    const V ratio = exp_terms(lit<V>(-2) * abs_(c) * inverse).em1;
    const V difference = select(right, zero - ratio * a.sigmoid * b.complement, ratio * b.sigmoid * a.complement);
    const V inner = fma_(w, a.sigmoid + b.sigmoid, (w + w) * (mass.em1 + one) / (zero - mass.em1));
    const V slope = select(low, zero - b.sigmoid, select(high, a.sigmoid, difference));  // of the nll, over c inverse
    const V spread = select(low, w * b.sigmoid, select(high, w * a.sigmoid, inner));
    return {select(low, b_nll, select(high, a_nll, nll)),
            {zero - slope * inverse, select(floored, zero, fma_(zero - slope * inverse, c, spread))}};
  }
};

// A class of K, of the logits.
struct Categorical {
  static constexpr const char* name = "categorical";
  static constexpr int required = 1, params = 1, options = 1;
  using Channels = Counts<0>;
  static constexpr int params_of(int) { return 0; }
};

// Discretized logistics (and their options), in each channel about a mean to which the channels before it are added,
// times the tanh of a coefficient each (Salimans et al. 2017, section 2.2). A component's parameters are a mean, a log
// scale and a coefficient of each of three channels, or the first two of one.
struct DiscretizedLogisticMixture {
  static constexpr const char* name = "discretized_logistic_mixture";
  static constexpr int required = 1, params = 1, options = DiscretizedLogistic::options + 2;
  using Channels = Counts<1, 3>;
  static constexpr int params_of(int channels) { return channels == 1 ? 2 : 9; }

  // of a bin, roughly
  template <class V>
  static VF_HD V log_width(const Options& o) {
    return log_parts((lit<V>(o[2]) - lit<V>(o[1])) / (lit<V>(o[0]) - lit<V>(1))).exponent * lit<V>(kLog2);
  }

  template <int C, class V>
  static VF_HD V offset(const Options& o) {
    return lit<V>(C) * log_width<V>(o);
  }

  template <int C, class S, class Emit, class V = typename S::V>
  static VF_HD V log_prob(const S& site, int k, const Options& o, const Emit& emit) {
    const V zero = lit<V>(0), shift = log_width<V>(o);
    const int K = site.components();
    V sum = zero;
    VF_ROLLED
    for (int c = 0; c < C; ++c) {
      const V x = site.target(c);
      V off = x - site.param(K * (1 + 3 * c) + k);
      // coefficient n of the three is that of channels (1, 0), (2, 0), (2, 1)
      const int first = c * (c - 1) / 2;
      VF_ROLLED
      for (int b = 0; b < c; ++b) {
        const auto t = tanh_terms(site.param(K * (3 + 3 * (first + b)) + k));
        off = fma_(zero - t.tanh, site.target(b), off);
      }
      const auto term = DiscretizedLogistic::of(off, site.param(K * (2 + 3 * c) + k), x, o);
      sum = sum - (term.nll + shift);
      emit(3 * c, zero - term.grad[0]);
      emit(3 * c + 1, zero - term.grad[1]);
      VF_ROLLED
      for (int b = 0; b < c; ++b) {
        const int n = 3 * (first + b) + 2;
        emit(n, zero - term.grad[0] * site.target(b) * tanh_terms(site.param(K * (1 + n) + k)).slope);
      }
    }
    return sum;
  }
};

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
    const V up = select(small, a + one, a), inverse = one / a, shifted = l - inverse;
    const V lost = fma_(fused_(inverse, a, lit<V>(-1)), inverse, l - (shifted + inverse));
    const V apart = e.em1 + (full_log_difference(shifted, x).difference + lost);
    const V dnorm = log_(up / a) + (stirling_from_one(up).slope - lit<V>(0.5) / up);
    return {data + (factorial_excess(a, log_a) - log_a), {zero - a * e.em1, select(small, apart, e.h) + dnorm}};
  }
};

// How many of so many trials (the third parameter) succeed, where the probability is Beta(alpha, beta).
struct BetaBinomial {
  static constexpr const char* name = "beta_binomial";
  static constexpr int required = 3, params = 3;

  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x) {
    const auto t = beta_binomial(p[0], p[1], count_of(x), select(less(p[2], x), lit<V>(kNaN), p[2]));
    return {t.nll, {t.da, t.db, t.dn}};
  }
};

using Likelihoods = TypeList<Bernoulli, Gaussian, Laplace, BernoulliProbs, ContinuousBernoulli, StudentT, Poisson,
                             NegativeBinomial, ZeroInflatedNegativeBinomial, DiscretizedLogistic, Categorical,
                             DiscretizedLogisticMixture, LogNormal, Gamma, BetaBinomial>;

}  // namespace VF_ISA
}  // namespace vaefast
