// Likelihoods: Of classes, and of data on a grid.
#pragma once

#include "likelihoods/term.h"
#include "mixture.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

// A logistic distribution's mass on the bin around x, the outer bins open (Salimans et al. 2017, equation 2). Options:
// the number of bins, the lowest and the highest x, and the least log scale.
struct DiscretizedLogistic {
  static constexpr const char* name = "discretized_logistic";
  static constexpr bool large = true, single = true;
  static constexpr int required = 2, params = 2, options = 4;

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    return of(x - p[0], p[1], x, o);
  }

  // c = x - mean. sigmoid(b) - sigmoid(a) = (1 - e^(a - b)) / ((1 + e^a) (1 + e^-b))
  template <class V>
  static VF_HD Term<V, 2> of(V c, V log_scale, V x, const Options& o) {
    if constexpr (kDouble<V>) return called(c, log_scale, x, o);
    return inlined(c, log_scale, x, o);
  }

  template <class V>
  static VF_CALLED Term<V, 2> called(V c, V log_scale, V x, const Options& o) {
    return inlined(c, log_scale, x, o);
  }

  template <class V>
  static VF_HD Term<V, 2> inlined(V c, V log_scale, V x, const Options& o) {
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

using DiscreteLikelihoods = TypeList<DiscretizedLogistic, Categorical, DiscretizedLogisticMixture>;

}  // namespace VF_ISA
}  // namespace vaefast
