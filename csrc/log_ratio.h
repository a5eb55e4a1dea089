// A draw's log density ratio, log p(z) - log q(z), of two diagonal Gaussians: one latent's share in it.
#pragma once

#include <type_traits>

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// Of N(mu, e^logvar): (z - mu) / std, what that is multiplied by once more for the slope in z, and its square plus the
// log variance.
template <class V>
struct Standardized {
  V d, inverse, twice;
};

// `root` is 1 / std. Of a variance that vanishes nothing is left at the mean, and all beside it.
template <class V>
VF_HD Standardized<V> standardized(V off, V root, V logvar) {
  const V inverse = select(equal(off, lit<V>(0)), lit<V>(1), root), d = off * inverse;
  return {d, inverse, select(less(abs_(d), infinity<V>()), fma_(d, d, logvar), abs_(d))};
}

// The derivatives of half of `twice`: that in z, which is minus that in mu, and -2 times that in the log variance.
template <class V>
struct GaussianSlopes {
  V mu, logvar;
};

template <class V>
VF_HD GaussianSlopes<V> slopes_of(const Standardized<V>& s) {
  return {s.d * s.inverse, fma_(s.d, s.d, lit<V>(-1))};
}

// f(std::integral_constant of the prior).
template <class F>
VF_HD void visit(DrawPrior prior, const F& f) {
  switch (prior) {
    case DrawPrior::kNone:
      return f(std::integral_constant<DrawPrior, DrawPrior::kNone>{});
    case DrawPrior::kStandard:
      return f(std::integral_constant<DrawPrior, DrawPrior::kStandard>{});
    case DrawPrior::kGiven:
      return f(std::integral_constant<DrawPrior, DrawPrior::kGiven>{});
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
