// Likelihoods: Of counts whose distribution is made of others.
#pragma once

#include "likelihoods/term.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

// A count of the first of two with probability sigmoid(p[3]), else of the second: of their means p[0] and p[1], and of
// the inverse dispersion p[2] that they share (totalVI's background and foreground). Options as NegativeBinomial's.
struct NegativeBinomialMixture {
  static constexpr const char* name = "negative_binomial_mixture";
  static constexpr bool large = true, single = true;
  static constexpr int required = 4, params = 4, options = 2;

  // log(b / a), given b - a
  template <class V>
  static VF_HD V log_ratio(V a, V b, V difference) {
    const V s = difference / (a + b);
    const auto near = less_equal(abs_(s), lit<V>(1.0 / 3));
    return select(near, twice_atanh(select(near, s, lit<V>(0))), log_(b / a));
  }

  // With a and b the two nlls, each beside its share: min(a, b) - log(1 + e^-|a - b|). How far they are apart is the
  // difference of the terms in the means, which are what the rounding of the nlls leaves nothing of where those are
  // large; or of the nlls, where they are smaller than such terms. Without `constant` an nll may be small and made of
  // terms as large as the count.
  template <class V>
  static VF_HD Term<V, 4> eval(const V (&p)[4], V x, const Options& o) {
    const V zero = lit<V>(0), eps = lit<V>(o[1]), count = count_of(x), theta = p[2], l = p[3];
    const bool constant = o[0].narrow != 0;
    const auto share = softplus_terms(l);
    const auto first = negative_binomial(p[0], eps, theta, count, constant);
    const auto second = negative_binomial(p[1], eps, theta, count, constant);
    const V mu = p[0] + eps, other = p[1] + eps, off = p[1] - p[0];
    const V by_total = (theta + count) * log_ratio(theta + mu, theta + other, off);
    const V by_mean = select(equal(count, zero), zero, count * log_ratio(mu, other, off));
    const V size = abs_(first.nll) + abs_(second.nll), terms = abs_(by_total) + abs_(by_mean);
    const auto smaller = less(terms, constant ? size : size + count);
    const auto apart = softplus_terms(select(smaller, by_total - by_mean, second.nll - first.nll) + l);
    const V a = first.nll + (select(less(l, zero), zero - l, zero) + share.tail), b = second.nll + softplus(l, share);
    const V least = select(less(b, a), b, a), of_first = apart.sigmoid, of_second = apart.complement;
    return {least - apart.tail,
            {of_first * first.dmu, of_second * second.dmu, fma_(of_first, first.dtheta, of_second * second.dtheta),
             share.sigmoid - of_first}};
  }
};

// How many of so many trials (the third parameter) succeed, where the probability is Beta(alpha, beta).
struct BetaBinomial {
  static constexpr const char* name = "beta_binomial";
  static constexpr bool large = true, single = true;
  static constexpr int required = 3, params = 3;

  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x) {
    const auto t = beta_binomial(p[0], p[1], count_of(x), select(less(p[2], x), lit<V>(kNaN), p[2]));
    return {t.nll, {t.da, t.db, t.dn}};
  }
};

using CompoundLikelihoods = TypeList<NegativeBinomialMixture, BetaBinomial>;

}  // namespace VF_ISA
}  // namespace vaefast
