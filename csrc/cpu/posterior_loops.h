// The loops over a posterior: its sample, its KL, and their gradients.
#pragma once

#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "posterior.h"

namespace vaefast {
inline namespace VF_ISA {
// a unit's own: what it calls once is inlined, the body of a loop among it
namespace {

// Against what the KL is taken: N(0, I), a Gaussian whose two numbers are constants, or one of tensors.
enum class Against { kStandard, kConstant, kTensors };

template <class T, Against A>
class PriorTile {
 public:
  using V = Wide<T>;

  PriorTile(const PosteriorProblem& p, const Tile& t)
      : fixed_(prior_of(lit<V>(p.prior_mu.value), lit<V>(p.prior_logvar.value))) {
    if constexpr (A == Against::kTensors) {
      mu_ = read(p.prior_mu, t, mu_buffer_);
      logvar_ = read(p.prior_logvar, t, logvar_buffer_);
    }
  }

  VF_HD KL<V> kl(V mu, const Scale<V>& q, int i) const {
    if constexpr (A == Against::kTensors) return of(mu, q, prior_of(at(mu_, i), at(logvar_, i)));
    if constexpr (A == Against::kConstant) return of(mu, q, fixed_);
    return kl_of(mu, q);
  }

 private:
  static VF_CALLED KL<V> called(V mu, const Scale<V>& q, const Prior<V>& prior) { return kl_of(mu, q, prior); }
  static VF_HD KL<V> of(V mu, const Scale<V>& q, const Prior<V>& prior) {
    if constexpr (kFewLoops<T>) return called(mu, q, prior);
    return kl_of(mu, q, prior);
  }

  Prior<V> fixed_;
  Buffer<T> mu_buffer_, logvar_buffer_;
  const T *mu_ = nullptr, *logvar_ = nullptr;
};

template <class P, class V>
VF_CALLED Scale<V> scale_apart(V raw) {
  return P::eval(raw);
}
template <class T, class P, class V>
VF_HD Scale<V> scale(V raw) {
  if constexpr (kFewLoops<T>) return scale_apart<P>(raw);
  return P::eval(raw);
}

// Raw values as the loops take them, which know of no clamp and no floor: within the clamp, or, with a floor, the scale
// itself, for the loops of "std". And what the loops' gradient is multiplied by to be the raw values'.
template <class T>
__attribute__((noinline)) const T* bounded(const Activation& a, const T* raw, int n, Buffer<T>& out, Buffer<T>& slope) {
  using V = Wide<T>;
  if (a.floored) {
    visit(a.kind, Parameterizations{}, [&](auto kind) {
      for_vectors<T>(n, [&](int i) {
        const auto q = scale_of<typename decltype(kind)::type>(a, at(raw, i));
        put(out.data, i, q.std);
        put(slope.data, i, q.dstd);
      });
    });
  } else {
    const V lo = lit<V>(a.lo), hi = lit<V>(a.hi);
    for_vectors<T>(n, [&](int i) {
      const V x = at(raw, i);
      put(out.data, i, clamped(x, lo, hi));
      put(slope.data, i, sloped(x, lo, hi, lit<V>(1)));
    });
  }
  return out.data;
}

template <class T, class P, bool SAMPLE, bool KLD, Against A>
double posterior_forward(const PosteriorProblem& p, const Tile& t) {
  using V = Wide<T>;
  Buffer<T> mu_buffer, raw_buffer, slope_buffer, noise_buffer, z_buffer, kl_buffer;
  const T* mu = read(p.mu, t, mu_buffer);
  const bool bounds = p.activation.clamped || p.activation.floored;
  const T* raw = read(p.raw, t, raw_buffer);
  if (bounds) raw = bounded(p.activation, raw, t.n, raw_buffer, slope_buffer);
  const T* eps = nullptr;
  if constexpr (SAMPLE) eps = p.philox.on ? read_noise(p.philox, t, noise_buffer) : read(p.eps, t, noise_buffer);
  const PriorTile<T, A> prior(p, t);
  T* z = writable(p.out_z, t, z_buffer);
  T* kl = writable(p.out_kl, t, kl_buffer);
  const bool each = p.out_kl.data != nullptr;
  Accumulator<T> sum(t);
  for_vectors<T>(t.n, [&](int i) {
    const V m = at(mu, i);
    const auto q = scale<T, P>(at(raw, i));
    if constexpr (SAMPLE) put(z, i, fma_(q.std, at(eps, i), m));
    if constexpr (KLD) {
      const V value = prior.kl(m, q, i).value;
      sum.add(i, value);
      if (each) put(kl, i, value);
    }
  });
  if constexpr (SAMPLE) write_back(p.out_z, t, z_buffer);
  if constexpr (KLD) write_back(p.out_kl, t, kl_buffer);
  return sum.total();
}

// With VALUE, the sum of the KL besides its gradients.
template <class T, class P, bool SAMPLE, bool KLD, Against A, bool VALUE>
double posterior_backward(const PosteriorProblem& p, const Tile& t) {
  using V = Wide<T>;
  Buffer<T> mu_buffer, raw_buffer, slope_buffer, noise_buffer, dz_buffer, dkl_buffer;
  Buffer<T> out_buffer[4];
  const T* mu = KLD ? read(p.mu, t, mu_buffer) : nullptr;
  const bool bounds = p.activation.clamped || p.activation.floored;
  const T* raw = read(p.raw, t, raw_buffer);
  if (bounds) raw = bounded(p.activation, raw, t.n, raw_buffer, slope_buffer);
  const T* eps = nullptr;
  if constexpr (SAMPLE) eps = p.philox.on ? read_noise(p.philox, t, noise_buffer) : read(p.eps, t, noise_buffer);
  const PriorTile<T, A> prior(p, t);
  const T* dz = SAMPLE ? read(p.dz, t, dz_buffer) : nullptr;
  const T* dkl = KLD ? read(p.dkl, t, dkl_buffer) : nullptr;
  const Operand* out[4] = {&p.out_dmu, &p.out_draw, &p.out_dprior_mu, &p.out_dprior_logvar};
  constexpr int outputs = A == Against::kTensors ? 4 : 2;
  T* grad[4];
  for (int k = 0; k < outputs; ++k) grad[k] = writable(*out[k], t, out_buffer[k]);
  const V factor = lit<V>(p.dkl_scale), prior_factor = lit<V>(p.dkl_prior_scale), zero = V(T(0));
  Accumulator<T> sum(t);
  for_vectors<T>(t.n, [&](int i) {
    const auto q = scale<T, P>(at(raw, i));
    V gmu = zero, graw = zero;
    if constexpr (SAMPLE) {
      gmu = at(dz, i);
      graw = gmu * at(eps, i) * q.dstd;
    }
    if constexpr (KLD) {
      const V upstream = at(dkl, i), g = upstream * factor;
      const auto k = prior.kl(at(mu, i), q, i);
      if constexpr (VALUE) sum.add(i, k.value);
      gmu = fma_(g, k.dmu, gmu);
      graw = fma_(g * k.dlogvar, q.dlogvar, graw);
      if constexpr (outputs == 4) {
        const V g_prior = upstream * prior_factor;
        put(grad[2], i, zero - g_prior * k.dmu);
        put(grad[3], i, g_prior * k.dprior_logvar);
      }
    }
    put(grad[0], i, gmu);
    put(grad[1], i, graw);
  });
  if (bounds) {
    for_vectors<T>(t.n, [&](int i) { put(grad[1], i, at<T>(grad[1], i) * at(slope_buffer.data, i)); });
  }
  for (int k = 0; k < outputs; ++k) write_back(*out[k], t, out_buffer[k]);
  return sum.total();
}

template <class T, class P, bool SAMPLE, bool KLD, Against A>
void posterior_scaled(const PosteriorProblem& p, int64_t begin, int64_t end) {
  const auto body = [&](const Tile& t) {
    if (!p.backward) return posterior_forward<T, P, SAMPLE, KLD, A>(p, t);
    if constexpr (!SAMPLE) {
      if (kFewLoops<T> || p.sum.out) return posterior_backward<T, P, SAMPLE, KLD, A, true>(p, t);
    }
    if constexpr (SAMPLE || !kFewLoops<T>) return posterior_backward<T, P, SAMPLE, KLD, A, false>(p, t);
  };
  for_units(p.space, p.sum.partial, kUnit, kTile, begin, end, body, kLanes<T>, true);
}

template <class T, bool SAMPLE, bool KLD, Against A>
void posterior_units(const PosteriorProblem& p, int64_t begin, int64_t end) {
  const int kind = p.activation.floored ? place_of<Std>(Parameterizations{}) : p.activation.kind;
  visit(kind, Parameterizations{}, [&](auto tag) {
    // N(0, I) is a Gaussian of two constants, too
    constexpr auto against = kFewLoops<T> && A == Against::kStandard ? Against::kConstant : A;
    posterior_scaled<T, typename decltype(tag)::type, SAMPLE, KLD, against>(p, begin, end);
  });
}

template <class T, bool SAMPLE>
void posterior_kl(const PosteriorProblem& p, int64_t begin, int64_t end) {
  if (!p.prior) return posterior_units<T, SAMPLE, true, Against::kStandard>(p, begin, end);
  p.prior_mu.data || p.prior_logvar.data ? posterior_units<T, SAMPLE, true, Against::kTensors>(p, begin, end)
                                         : posterior_units<T, SAMPLE, true, Against::kConstant>(p, begin, end);
}

}  // namespace

template <class T>
void run_posterior(const PosteriorProblem& p, int64_t begin, int64_t end) {
  if (!p.kl) return posterior_units<T, true, false, Against::kStandard>(p, begin, end);
  p.sample ? posterior_kl<T, true>(p, begin, end) : posterior_kl<T, false>(p, begin, end);
}

}  // namespace VF_ISA
}  // namespace vaefast
