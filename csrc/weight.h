// What a weight does to a loss and to its gradients.
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// w x, but where w is 0 selects 0 and does not multiply by it: what the element held must not matter.
template <class V>
VF_HD V weighted(V w, V x) {
  const V zero = lit<V>(0);
  return select(equal(w, zero), zero, w * x);
}

}  // namespace VF_ISA
}  // namespace vaefast
