// The posterior: parameterisations of its scale, sampling, and the KL between diagonal Gaussians with its gradients.
// A parameterisation is one struct here, listed in Parameterizations, and one entry in vaefast/_gaussian.py.
#pragma once

#include "registry.h"
#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// The scale at a raw value, its derivatives with respect to it, and what a KL against N(0, I) takes. Whatever a caller
// does not read costs nothing.
template <class V>
struct Scale {
  V std, logvar, dstd, dlogvar;
  ExpTerms<V> terms;  // of logvar
};

struct LogVar {
  static constexpr const char* name = "logvar";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const auto e = exp_terms(raw);
    return {e.root, raw, e.root * lit<V>(0.5), lit<V>(1), e};
  }
};

struct LogStd {
  static constexpr const char* name = "log_std";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const auto e = exp_terms(raw + raw);
    return {e.root, raw + raw, e.root, lit<V>(2), e};
  }
};

struct Std {
  static constexpr const char* name = "std";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const V logvar = lit<V>(2) * log_(raw);
    return {raw, logvar, lit<V>(1), lit<V>(2) / raw, exp_terms(logvar, raw)};
  }
};

struct Var {
  static constexpr const char* name = "var";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const V s = sqrt_(raw), logvar = log_(raw);
    return {s, logvar, lit<V>(0.5) / s, lit<V>(1) / raw, exp_terms(logvar, s)};
  }
};

struct Softplus {
  static constexpr const char* name = "softplus";
  template <class V>
  static VF_HD Scale<V> eval(V raw) {
    const auto s = softplus_terms(raw);
    // far below 0 it is e^raw, whose logarithm does not underflow
    const V std = softplus(raw, s), two = lit<V>(2);
    const auto low = less(raw, lit<V>(kDouble<V> ? -40 : -20));
    const V logvar = two * select(low, raw, log_(std));
    return {std, logvar, s.sigmoid, select(low, two, two * s.sigmoid / std), exp_terms(logvar, std)};
  }
};

using Parameterizations = TypeList<LogVar, LogStd, Std, Var, Softplus>;

template <class V>
VF_HD V clamped(V raw, V lo, V hi) {
  return select(less(raw, lo), lo, select(less(hi, raw), hi, raw));
}

// The slope, where the clamp leaves one.
template <class V>
VF_HD V sloped(V raw, V lo, V hi, V slope) {
  const V zero = lit<V>(0);
  return select(less_equal(raw, lo), zero, select(less_equal(hi, raw), zero, slope));
}

template <class P, class V>
VF_HD Scale<V> scale_of(const Activation& a, V raw) {
  const V lo = lit<V>(a.lo), hi = lit<V>(a.hi), within = a.clamped ? clamped(raw, lo, hi) : raw;
  Scale<V> s = P::eval(within);
  if (a.floored) {
    s.std = s.std + lit<V>(a.floor);
    s.logvar = lit<V>(2) * log_(s.std);
    s.dlogvar = lit<V>(2) * s.dstd / s.std;
    s.terms = exp_terms(s.logvar, s.std);
  }
  if (a.clamped) {
    s.dstd = sloped(raw, lo, hi, s.dstd);
    s.dlogvar = sloped(raw, lo, hi, s.dlogvar);
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

template <class V>
struct Prior {
  V mu, logvar, inverse;  // 1 / std
};

template <class V>
VF_HD Prior<V> prior_of(V mu, V logvar) {
  return {mu, logvar, exp_(logvar * lit<V>(-0.5))};
}

template <class V>
VF_HD KL<V> kl_of(V mu, const Scale<V>& q) {
  const V half = lit<V>(0.5);
  return {half * fma_(mu, mu, q.terms.h), mu, half * q.terms.em1, lit<V>(0)};
}

template <class V>
VF_HD KL<V> kl_of(V delta, V slope, const ExpTerms<V>& e) {
  const V half = lit<V>(0.5);
  return {half * fma_(delta, delta, e.h), slope, half * e.em1, lit<V>(-0.5) * fma_(delta, delta, e.em1)};
}

// Of any log variances, d apart: their roots may be no numbers where the ratio of those is one; means that are off
// apart are scaled step by step, and where off is 0 it stays that.
template <class V>
VF_CALLED KL<V> far_kl(V off, V d, V prior_logvar) {
  const auto none = equal(off, lit<V>(0));
  const V step = exp_(prior_logvar * lit<V>(-0.25)), delta = select(none, off, off * step * step);
  return kl_of(delta, select(none, off, delta * step * step), exp_terms(d));
}

// Up to here |prior_logvar| leaves a normal number of the prior's std; a std that is none beside it is next to 0 or
// infinite in that.
template <class V>
constexpr double kOrdinary = kDouble<V> ? 700 : 80;

template <class V>
VF_HD KL<V> kl_of(V mu, const Scale<V>& q, const Prior<V>& prior) {
  const V off = mu - prior.mu, d = q.logvar - prior.logvar, delta = off * prior.inverse;
  KL<V> kl = kl_of(delta, delta * prior.inverse, exp_terms(d, q.std * prior.inverse));
  const auto far = less(lit<V>(kOrdinary<V>), abs_(prior.logvar));
  if (any(far)) {
    const KL<V> other = far_kl(off, d, prior.logvar);
    kl = {select(far, other.value, kl.value), select(far, other.dmu, kl.dmu), select(far, other.dlogvar, kl.dlogvar),
          select(far, other.dprior_logvar, kl.dprior_logvar)};
  }
  return kl;
}

}  // namespace VF_ISA
}  // namespace vaefast
