// A batch's aggregate posterior: what one of its posteriors adds to a sample's marginal, and to the gradients.
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// A GPU's instructions negate what they read at no cost.
template <class V>
VF_HD V negative(V x) {
  return lit<V>(0) - x;
}
VF_HD float negative(float x) { return -x; }
VF_HD double negative(double x) { return -x; }

// (z - mu) slope, and the logarithm of the term.
template <class V>
struct MarginalTerm {
  V t, exponent;
};

template <class V>
VF_HD MarginalTerm<V> marginal_term(V z, V mu, V slope, V constant) {
  const V t = (z - mu) * slope;
  return {t, fma_(negative(t), t, constant)};
}

// A posterior's gradients, of its terms' shares in the samples': in mu, but for a factor 2 slope, and in the log
// variance. What is added to the first is the sample's own gradient, but for -2 slope.
template <class V>
struct MarginalSums {
  V moved = lit<V>(0), of_logvar = lit<V>(0);

  VF_HD V add(V share, V t) {
    const V of_mean = share * t;
    moved = moved + of_mean;
    of_logvar = fma_(share, lit<V>(-0.5), fma_(of_mean, t, of_logvar));
    return of_mean;
  }
};

}  // namespace VF_ISA
}  // namespace vaefast
