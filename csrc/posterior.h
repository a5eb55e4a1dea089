// The posterior: parameterisations of its scale, sampling, and the KL between diagonal Gaussians with its gradients.
// A parameterisation is one struct here, listed in Parameterizations, and one entry in vaefast/reference.py.
#pragma once

#include "registry.h"
#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// The scale at a raw value, and its derivatives with respect to it.
template <class V>
struct Scale {
  V std, logvar, dstd, dlogvar;
};

struct LogVar {
  static constexpr const char* name = "logvar";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const V s = exp_(raw * lit<V>(0.5));
    return {s, raw, s * lit<V>(0.5), lit<V>(1)};
  }
};

struct LogStd {
  static constexpr const char* name = "log_std";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const V s = exp_(raw);
    return {s, raw + raw, s, lit<V>(2)};
  }
};

struct Std {
  static constexpr const char* name = "std";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    return {raw, lit<V>(2) * log_(raw), lit<V>(1), lit<V>(2) / raw};
  }
};

struct Var {
  static constexpr const char* name = "var";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const V s = sqrt_(raw);
    return {s, log_(raw), lit<V>(0.5) / s, lit<V>(1) / raw};
  }
};

struct Softplus {
  static constexpr const char* name = "softplus";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const auto s = softplus_terms(raw);
    const V std = fma_(raw, s.step, s.tail);
    return {std, lit<V>(2) * log_(std), s.sigmoid, lit<V>(2) * s.sigmoid / std};
  }
};

using Parameterizations = TypeList<LogVar, LogStd, Std, Var, Softplus>;

template <class P, class V>
VF_HD Scale<V> scale_of(const Activation& a, V raw) {
  const V lo = lit<V>(a.lo), hi = lit<V>(a.hi), zero = lit<V>(0);
  const V clamped = a.clamped ? select(raw < lo, lo, select(raw > hi, hi, raw)) : raw;
  Scale<V> s = P::eval(clamped);
  if (a.floored) {
    s.std = s.std + lit<V>(a.floor);
    s.logvar = lit<V>(2) * log_(s.std);
    s.dlogvar = lit<V>(2) * s.dstd / s.std;
  }
  if (a.clamped) {
    s.dstd = select(raw <= lo, zero, select(raw >= hi, zero, s.dstd));
    s.dlogvar = select(raw <= lo, zero, select(raw >= hi, zero, s.dlogvar));
  }
  return s;
}

// KL(N(mu, std^2) || N(prior_mu, e^prior_logvar)) and its derivatives (Kingma & Welling 2014, appendix B, rearranged):
//   d = logvar - prior_logvar,  KL = (h(d) + (mu - prior_mu)^2 e^-prior_logvar) / 2
// e^d comes as a square, so that one exponential serves the sample and the KL, and halves its range: no early overflow.
template <class V>
struct KL {
  V value, dmu, dlogvar, dprior_logvar;  // d / d prior_mu is -dmu
};

template <bool PRIOR, class V>
VF_HD KL<V> kl_of(V mu, const Scale<V>& q, V prior_mu, V prior_logvar) {
  const V half = lit<V>(0.5);
  if constexpr (PRIOR) {
    const V inverse = exp_(prior_logvar * lit<V>(-0.5));  // 1 / prior std
    const V ratio = q.std * inverse, delta = (mu - prior_mu) * inverse;
    const auto e = exp_terms(q.logvar - prior_logvar, ratio * ratio);
    const V square = delta * delta;
    return {half * (e.h + square), delta * inverse, half * e.em1, lit<V>(-0.5) * (e.em1 + square)};
  } else {
    const auto e = exp_terms(q.logvar, q.std * q.std);
    return {half * fma_(mu, mu, e.h), mu, half * e.em1, lit<V>(0)};
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
