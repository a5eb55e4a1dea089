// IVON (Shen et al. 2024, arXiv:2402.17641, algorithm 1) at one weight, whose posterior is N(m, 1 / (ess (h + delta))).
#pragma once

#include "problems.h"
#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// The posterior's standard deviation.
template <class V>
VF_HD V ivon_std(const IvonNumbers& n, V hess) {
  return lit<V>(1) / sqrt_((hess + lit<V>(n.weight_decay)) * lit<V>(n.ess));
}

// A step, from the means over its draws of the loss's gradient, and of that times the draw less m.
template <class V>
VF_HD void ivon_update(const IvonNumbers& n, V gradient, V product, V& mean, V& momentum, V& hess) {
  const V delta = lit<V>(n.weight_decay);
  momentum = fma_(lit<V>(1 - n.beta1), gradient - momentum, momentum);
  const V curved = hess + delta, apart = product * curved * lit<V>(n.ess) - hess;
  const V moved = lit<V>(1 - n.beta2) * apart;
  hess = hess + fma_(lit<V>(0.5) * moved, moved / curved, moved);
  const V step = fma_(delta, mean, momentum * lit<V>(n.unbias)) / (hess + delta);
  const V least = lit<V>(-n.clip_radius), most = lit<V>(n.clip_radius);
  mean = fma_(lit<V>(-n.rate), select(less(most, step), most, select(less(step, least), least, step)), mean);
}

}  // namespace VF_ISA
}  // namespace vaefast
