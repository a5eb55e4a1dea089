// The product of Gaussian experts at one column, from log variances of any size: no precision is formed. With `least`
// the least of the log variances, an expert's weight is e^(least - logvar), and `sum` is that of them all.
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// The log variance of a missing expert, beside which every other decides.
constexpr double kMissing = 1e30;

// The prior's weight, infinite beside experts that say nothing.
template <bool PRIOR, class V>
VF_HD V weight_of_prior(V least) {
  return PRIOR ? exp_(least) : lit<V>(0);
}

// The product's log variance; with MASKED it is infinite where all are missing.
template <bool PRIOR, bool MASKED, class V>
VF_HD V product_logvar(V sum, V least, V of_prior) {
  const V zero = lit<V>(0), one = lit<V>(1);
  if constexpr (PRIOR) {
    // log(1 + t) = 2 atanh(t / (2 + t)) of a precision t = sum / of_prior up to 1, which keeps its relative accuracy;
    // else the logarithm of all weights, with m 2^e for them e log 2 + 2 atanh((m - 1) / (m + 1))
    const auto small = less_equal(sum, of_prior);
    const V total = sum + of_prior;
    const auto p = log_parts(select(small, one, total));
    const V s = select(small, sum, p.mantissa - one) / select(small, of_prior + total, p.mantissa + one);
    return select(small, zero, least) - fma_(p.exponent, lit<V>(0.693147180559945309417), twice_atanh(s));
  } else {
    const V found = least - log_(sum);
    if constexpr (!MASKED) return found;
    // plus 0, unless what is there is NaN
    return select(equal(least, lit<V>(kMissing)), infinity<V>() + (sum - sum), found);
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
