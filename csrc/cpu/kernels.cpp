// The CPU loops over the functors, compiled once per instruction set.
//
// The way of an operation, by the example of elbo_loss(recon, x, mu, logvar) of float32:
//
//   1. operators/elbo.cpp puts what it was given into two problems (problems.h), plain data: a ReconstructionProblem
//   with
//      recon and x as operands, the gradient of recon and the sum as what is to be written, and a PosteriorProblem.
//   2. cpu/launch.cpp cuts each problem into units and hands stretches of them, [begin, end), to threads: here to
//      reconstruction() and posterior(), the two functions that this file gives out.
//   3. What is the same for all elements is decided once, outside the loops, by visit() and by templates: the
//   arithmetic
//      type (reconstruction_typed), the likelihood (Bernoulli), how many parameters were given (reconstruction_params),
//      whether a gradient is wanted (reconstruction_units). So there is a loop for each combination.
//   4. for_units() walks through a unit by tiles of 1,024 elements. reconstruction_tile<float, Bernoulli, 1, true,
//   true>
//      is such a loop: read() gives recon's and x's tile as contiguous floats, in place or brought into a buffer;
//      for_vectors() takes a vector of each, eval_term<Bernoulli> of likelihoods.h computes loss and gradient,
//      sum.add() and put() take them; write_back() stores what could not be written in place.
//   5. Each unit's sum goes to its place in `partial`, and launch.cpp adds those up in a fixed order.
//
// A likelihood or a parameterization comes into step 3 by its type list and into step 4 as a functor: no line here
// names one.

#include "cpu/kernels.h"

#include "cpu/mixture_tile.h"
#include "cpu/noise.h"
#include "cpu/tile.h"
#include "likelihoods.h"
#include "posterior.h"
#include "weight.h"

namespace vaefast {
inline namespace VF_ISA {
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
    if constexpr (A == Against::kTensors) return kl_of(mu, q, prior_of(at(mu_, i), at(logvar_, i)));
    if constexpr (A == Against::kConstant) return kl_of(mu, q, fixed_);
    return kl_of(mu, q);
  }

 private:
  Prior<V> fixed_;
  Buffer<T> mu_buffer_, logvar_buffer_;
  const T *mu_ = nullptr, *logvar_ = nullptr;
};

// The scale without clamp and floor, decided once: their branches would stay in the loop.
template <class P>
struct Plain {
  template <class V>
  static VF_HD Scale<V> scale(const Activation&, V raw) {
    return P::eval(raw);
  }
};

template <class P>
struct Bounded {
  template <class V>
  static VF_HD Scale<V> scale(const Activation& a, V raw) {
    return scale_of<P>(a, raw);
  }
};

template <class T, class P, bool SAMPLE, bool KLD, Against A>
double posterior_forward(const PosteriorProblem& p, const Tile& t) {
  using V = Wide<T>;
  Buffer<T> mu_buffer, raw_buffer, noise_buffer, z_buffer, kl_buffer;
  const T* mu = read(p.mu, t, mu_buffer);
  const T* raw = read(p.raw, t, raw_buffer);
  const T* eps = nullptr;
  if constexpr (SAMPLE) eps = p.philox.on ? read_noise(p.philox, t, noise_buffer) : read(p.eps, t, noise_buffer);
  const PriorTile<T, A> prior(p, t);
  T* z = writable(p.out_z, t, z_buffer);
  T* kl = writable(p.out_kl, t, kl_buffer);
  const bool each = p.out_kl.data != nullptr;
  Accumulator<T> sum(t);
  for_vectors<T>(t.n, [&](int i) {
    const V m = at(mu, i);
    const auto q = P::scale(p.activation, at(raw, i));
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
  Buffer<T> mu_buffer, raw_buffer, noise_buffer, dz_buffer, dkl_buffer;
  Buffer<T> out_buffer[4];
  const T* mu = KLD ? read(p.mu, t, mu_buffer) : nullptr;
  const T* raw = read(p.raw, t, raw_buffer);
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
    const auto q = P::scale(p.activation, at(raw, i));
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
  for (int k = 0; k < outputs; ++k) write_back(*out[k], t, out_buffer[k]);
  return sum.total();
}

template <class T, class P, bool SAMPLE, bool KLD, Against A>
void posterior_scaled(const PosteriorProblem& p, int64_t begin, int64_t end) {
  for_units(p.space, p.sum.partial, kUnit, kTile, begin, end, [&](const Tile& t) {
    if (!p.backward) return posterior_forward<T, P, SAMPLE, KLD, A>(p, t);
    if constexpr (!SAMPLE) {
      if (p.sum.out) return posterior_backward<T, P, SAMPLE, KLD, A, true>(p, t);
    }
    return posterior_backward<T, P, SAMPLE, KLD, A, false>(p, t);
  });
}

template <class T, bool SAMPLE, bool KLD, Against A>
void posterior_units(const PosteriorProblem& p, int64_t begin, int64_t end) {
  visit(p.activation.kind, Parameterizations{}, [&](auto kind) {
    using P = typename decltype(kind)::type;
    p.activation.clamped || p.activation.floored ? posterior_scaled<T, Bounded<P>, SAMPLE, KLD, A>(p, begin, end)
                                                 : posterior_scaled<T, Plain<P>, SAMPLE, KLD, A>(p, begin, end);
  });
}

template <class T, bool SAMPLE>
void posterior_kl(const PosteriorProblem& p, int64_t begin, int64_t end) {
  if (!p.prior) return posterior_units<T, SAMPLE, true, Against::kStandard>(p, begin, end);
  if (p.prior_mu.data || p.prior_logvar.data) return posterior_units<T, SAMPLE, true, Against::kTensors>(p, begin, end);
  posterior_units<T, SAMPLE, true, Against::kConstant>(p, begin, end);
}

template <class T>
void posterior_typed(const PosteriorProblem& p, int64_t begin, int64_t end) {
  if (!p.kl) return posterior_units<T, true, false, Against::kStandard>(p, begin, end);
  p.sample ? posterior_kl<T, true>(p, begin, end) : posterior_kl<T, false>(p, begin, end);
}

void posterior(const PosteriorProblem& p, int64_t begin, int64_t end) {
  p.wide ? posterior_typed<double>(p, begin, end) : posterior_typed<float>(p, begin, end);
}

template <class T, class L, int N, bool NLL, bool GRAD>
double reconstruction_tile(const ReconstructionProblem& p, const Tile& t) {
  using V = Wide<T>;
  Buffer<T> param_buffer[N], target_buffer, weight_buffer, upstream_buffer, nll_buffer, grad_buffer[N];
  const T* param[N];
  for (int k = 0; k < N; ++k) param[k] = read(p.param[k], t, param_buffer[k]);
  const T* target = read(p.target, t, target_buffer);
  const T* weight = p.weight.data ? read(p.weight, t, weight_buffer) : nullptr;
  const T* upstream = p.upstream.data ? read(p.upstream, t, upstream_buffer) : nullptr;
  T* nll = writable(p.out_nll, t, nll_buffer);
  const bool each = p.out_nll.data != nullptr;
  T* grad[N];
  if constexpr (GRAD) {
    for (int k = 0; k < N; ++k) grad[k] = writable(p.out_grad[k], t, grad_buffer[k]);
  }
  const V factor = lit<V>(p.grad_scale);
  Accumulator<T> sum(t);
  for_vectors<T>(t.n, [&](int i) {
    V x[N];
    for (int k = 0; k < N; ++k) x[k] = at(param[k], i);
    auto term = eval_term<L>(x, at(target, i), p.options);
    V scale = upstream ? factor * at(upstream, i) : factor;
    if (weight) {
      const V w = at(weight, i);
      term.nll = weighted(w, term.nll);
      for (int k = 0; k < N; ++k) term.grad[k] = weighted(w, term.grad[k]);
    }
    if constexpr (NLL) {
      sum.add(i, term.nll);
      if (each) put(nll, i, term.nll);
    }
    if constexpr (GRAD) {
      for (int k = 0; k < N; ++k) put(grad[k], i, term.grad[k] * scale);
    }
  });
  if constexpr (NLL) write_back(p.out_nll, t, nll_buffer);
  if constexpr (GRAD) {
    for (int k = 0; k < N; ++k) write_back(p.out_grad[k], t, grad_buffer[k]);
  }
  return sum.total();
}

// Gradients that an earlier call left, times upstream.
template <class T>
double rescale_tile(const ReconstructionProblem& p, const Tile& t) {
  Buffer<T> upstream_buffer, grad_buffer, out_buffer;
  const T* upstream = read(p.upstream, t, upstream_buffer);
  for (int k = 0; k < p.nparams; ++k) {
    const T* grad = read(p.out_grad[k], t, grad_buffer);
    T* out = writable(p.out_grad[k], t, out_buffer);
    for_vectors<T>(t.n, [&](int i) { put(out, i, at(grad, i) * at(upstream, i)); });
    write_back(p.out_grad[k], t, out_buffer);
  }
  return 0;
}

template <class T, class L, int N>
void reconstruction_units(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  for_units(p.space, p.sum.partial, kUnit, kTile, begin, end, [&](const Tile& t) {
    if (!p.grad) return reconstruction_tile<T, L, N, true, false>(p, t);
    return p.nll ? reconstruction_tile<T, L, N, true, true>(p, t) : reconstruction_tile<T, L, N, false, true>(p, t);
  });
}

template <class T, class L, int N>
void reconstruction_params(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  if (p.nparams == N) return reconstruction_units<T, L, N>(p, begin, end);
  if constexpr (N > L::required) reconstruction_params<T, L, N - 1>(p, begin, end);
}

template <class T>
void reconstruction_typed(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  if (p.kept) {
    return for_units(p.space, nullptr, kUnit, kTile, begin, end, [&](const Tile& t) { return rescale_tile<T>(p, t); });
  }
  visit(p.likelihood, Likelihoods{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (kMixture<L>) {
      mixture_units<T, L>(p, begin, end);
    } else {
      reconstruction_params<T, L, L::params>(p, begin, end);
    }
  });
}

void reconstruction(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  p.wide ? reconstruction_typed<double>(p, begin, end) : reconstruction_typed<float>(p, begin, end);
}

}  // namespace
}  // namespace VF_ISA

#define VF_PASTE_(a, b) a##b
#define VF_PASTE(a, b) VF_PASTE_(a, b)

const CpuKernels& VF_PASTE(cpu_kernels_, CPU_CAPABILITY)() {
  static const CpuKernels kernels{posterior, reconstruction};
  return kernels;
}

}  // namespace vaefast
