// Likelihoods: Of counts.
#pragma once

#include "likelihoods/term.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

// A count, of a log rate. With `constant` (its option), log(x!) is in.
struct Poisson {
  static constexpr const char* name = "poisson";
  static constexpr int required = 1, params = 1, options = 1;

  // e^l - x l + log(x!) = x h(d) + (log(x!) - x log x + x) with d = l - log x, where large terms cancel on paper.
  // Without log(x!) there are the two terms alone, of which an infinite rate leaves none.
  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V l = p[0], zero = lit<V>(0);
    const auto none = equal(x, zero);
    const V count = select(none, lit<V>(1), count_of(x));
    const auto log = log_difference(l, count);
    const auto e = exp_terms(select(none, l, log.difference));
    const V slope = select(none, e.root * e.root, count * e.em1);
    if (o[0].narrow != 0) {
      return {select(none, slope, fma_(count, e.h, factorial_excess(count, log.log))), {slope}};
    }
    const V rate = exp_(l), most = rate + (count - count);
    return {select(none, rate, select(equal(most, infinity<V>()), most, fma_(zero - count, l, rate))), {slope}};
  }
};

// A count, of its mean and inverse dispersion. Options: `constant` as for Poisson, and `eps`, which is added to the
// mean.
struct NegativeBinomial {
  static constexpr const char* name = "negative_binomial";
  static constexpr bool large = true, single = true;
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
  static constexpr bool large = true, single = true;
  static constexpr int required = 3, params = 3, options = 2;

  // At 0, with n the negative binomial's nll: softplus(-l) - softplus(-n - l) = min(n, max(-l, 0)) + tails; its
  // gradient reaches n with weight sigmoid(-n - l). Elsewhere softplus(l) + n.
  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x, const Options& o) {
    const V zero = lit<V>(0), one = lit<V>(1), count = count_of(x), l = select(equal(count, count), p[2], count);
    const auto t = negative_binomial(p[0], lit<V>(o[1]), p[1], count, o[0].narrow != 0);
    const auto dropout = softplus_terms(l), kept = softplus_terms(zero - t.nll - l);
    const V most = select(less(l, zero), zero - l, zero), least = select(less(t.nll, most), t.nll, most);
    const auto none = equal(x, zero);
    const V weight = select(none, kept.sigmoid, one);
    return {select(none, least + dropout.tail - kept.tail, softplus(l, dropout) + t.nll),
            {t.dmu * weight, t.dtheta * weight, select(none, kept.sigmoid - dropout.complement, dropout.sigmoid)}};
  }
};

using CountLikelihoods = TypeList<Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial>;

}  // namespace VF_ISA
}  // namespace vaefast
