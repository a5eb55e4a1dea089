// The product of Gaussian experts at one column, from log variances of any size: no precision is formed. With `least`
// the least of the log variances, an expert's weight is e^(least - logvar), and `sum` is that of them all.
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// The log variance of a missing expert, beside which every other decides.
constexpr double kMissing = 1e30;

// What weights are multiplied by to be shares in the mean. The prior's weight is e^least, infinite beside experts that
// say nothing.
template <bool PRIOR, class V>
VF_HD V share_of_weight(V sum, V least) {
  if constexpr (PRIOR) sum = sum + exp_(least);
  return lit<V>(1) / sum;
}

// With MASKED it is infinite where all are missing.
template <bool PRIOR, bool MASKED, class V>
VF_HD V product_logvar(V sum, V least) {
  const V zero = lit<V>(0), one = lit<V>(1);
  if constexpr (PRIOR) {
    // log(1 + t) = 2 atanh(t / (2 + t)) of a precision t = sum / own up to 1, which keeps its relative accuracy
    const V own = exp_(least);
    const auto small = less_equal(sum, own);
    const V ratio = select(small, sum / (own + own + sum), zero);
    return select(small, zero - twice_atanh(ratio), least - log_(select(small, one, sum + own)));
  } else {
    const V found = least - log_(sum);
    if constexpr (!MASKED) return found;
    // plus 0, unless what is there is NaN
    return select(equal(least, lit<V>(kMissing)), infinity<V>() + (sum - sum), found);
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
