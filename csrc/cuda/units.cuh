// What a group of threads does with one unit of work: a stretch of consecutive elements of one row. Each returns its
// thread's part of the unit's sum. No torch types here.
//
// The way of an operation, by the example of elbo_loss(recon, x, mu, logvar) of strided float32:
//
//   1. operators/elbo.cpp puts what it was given into two problems (problems.h); launch.cu hands them to run.cuh.
//   2. run_one() there finds out how the loops reach each operand (set_access: linear, by row, by its index in every
//      dimension) and how they move all (in packs of 16 bytes where memory allows), cuts both problems into units
//      (geometry_of in kernel.cuh) and puts the whole into a Launch, which the kernel gets by value.
//   3. launch_reconstruction.cuh picks the kernel for what is the same for all elements: the arithmetic type, the
//      likelihood, how many parameters were given, and the posterior's part beside it. Contiguous packs of one dtype
//      take the kernels of plain.cuh instead, which decide nothing in their loops.
//   4. The kernel (kernel.cuh): blocks [0, rec.blocks) take the reconstruction, the rest the posterior. A group of
//   threads
//      has a unit, and calls run() of one of the structs below: Reconstruction<float, Bernoulli, 1>.
//   5. for_packs() walks through the unit; fetch() begins all loads of a pack before decode() needs the first;
//      eval_term<Bernoulli> of likelihoods.h computes loss and gradient of each element; write() stores.
//   6. Each unit's sum goes to its place in `partial`; the block that is last to finish adds those up in a fixed order,
//      nll + beta * kl among them.
//
// A likelihood or a parameterization comes into step 3 by its type list and into step 5 as a functor: no line here
// names one.
#pragma once

#include "cuda/noise.cuh"
#include "likelihoods/term.h"
#include "posterior.h"
#include "weight.h"

namespace vaefast {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Elements [first, limit), shared by `width` threads of which this is number `lane`.
struct Unit {
  int64_t first, limit;
  int lane, width;
  // of one of a list: where its operands lie, and how many Philox counters those before it have
  void* const* data = nullptr;
  uint64_t skipped = 0;
};

template <class M, class F>
__device__ inline void for_packs(const Space& space, const Unit& u, const F& f) {
  constexpr int N = M::N;
  if constexpr (M::plain) {
    // whole packs, and few enough elements for 32 bits
    for (uint32_t start = uint32_t(u.first) + u.lane * N; start < uint32_t(u.limit); start += u.width * N) {
      Pack at{space, start, 0, N};
      if constexpr (M::listed) at.data = u.data;
      if (space.views) at.row = uint32_t(product(start, space.reciprocal) >> 32) >> space.shift;
      f(at);
    }
  } else {
    // packs begin at multiples of N whatever the unit, so that memory is aligned and a pack is one Philox counter
    for (int64_t start = u.first / N * N + u.lane * N; start < u.limit; start += u.width * N) {
      Pack at{space, start, 0, N};
      if constexpr (M::listed) at.data = u.data;
      if (start < u.first) at.lo = int(u.first - start);
      if (u.limit - start < N) at.hi = int(u.limit - start);
      if (space.views) divide(space, start, space.size[space.ndim - 1], at.outer, at.column);
      f(at);
    }
  }
}

template <class T, int N>
__device__ inline void scales_of(const Activation& a, const T (&raw)[N], Scale<T> (&out)[N]) {
  visit(a.kind, Parameterizations{}, [&](auto kind) {
    using P = typename decltype(kind)::type;
    visit(a.clamped || a.floored, [&](auto bounded) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = decltype(bounded)::value ? scale_of<P>(a, raw[i]) : P::eval(raw[i]);
    });
  });
}

// What every posterior's kernel reads of a pack. SAMPLE and KLD say what is there, besides.
template <class T, class M, bool SAMPLE, bool KLD>
struct PosteriorPack {
  static constexpr int N = M::N;
  T mu[N], raw[N], eps[N], prior_mu[N], prior_logvar[N];
  Bits<T, N> mu_bits, raw_bits, eps_bits, prior_mu_bits, prior_logvar_bits;

  __device__ PosteriorPack(const PosteriorProblem& p, const Pack& at) {
    mu_bits = fetch<T, M>(p.mu, at);
    raw_bits = fetch<T, M>(p.raw, at);
    if (SAMPLE && !p.philox.on) eps_bits = fetch<T, M>(p.eps, at);
    if (KLD && p.prior) {
      prior_mu_bits = fetch_optional<T, M>(p.prior_mu, at);
      prior_logvar_bits = fetch_optional<T, M>(p.prior_logvar, at);
    }
  }

  __device__ void decode_all(const PosteriorProblem& p, const Stream& stream, const Pack& at) {
    // the noise first, while the loads are on their way
    if constexpr (SAMPLE) p.philox.on ? read_noise(p.philox, stream, at, eps) : decode<M>(p.eps, eps_bits, eps);
    decode<M>(p.mu, mu_bits, mu);
    decode<M>(p.raw, raw_bits, raw);
    if (KLD && p.prior) {
      decode_optional<M>(p.prior_mu, prior_mu_bits, prior_mu);
      decode_optional<M>(p.prior_logvar, prior_logvar_bits, prior_logvar);
    }
  }

  template <bool PRIOR>
  __device__ KL<T> kl(const Scale<T>& q, int i) const {
    if constexpr (PRIOR) {
      return kl_of(mu[i], q, prior_of(prior_mu[i], prior_logvar[i]));
    } else {
      return kl_of(mu[i], q);
    }
  }
};

template <class T_, bool SAMPLE, bool KLD>
struct PosteriorForward {
  using T = T_;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool first_thread) {
    constexpr int N = M::N;
    Stream stream{};
    if (SAMPLE && p.philox.on) stream = open_stream(p.philox, first_thread, M::listed ? u.skipped : 0);
    T sum = 0;
    for_packs<M>(p.space, u, [&](const Pack& at) {
      PosteriorPack<T, M, SAMPLE, KLD> x(p, at);
      x.decode_all(p, stream, at);
      Scale<T> q[N];
      T kl[N];
      scales_of(p.activation, x.raw, q);
      if constexpr (KLD) {
        T part = 0;
        visit(p.prior, [&](auto prior) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            kl[i] = x.template kl<decltype(prior)::value>(q[i], i).value;
            if (at.holds(i)) part += kl[i];
          }
        });
        sum += part;
        write<M>(p.out_kl, at, kl);
      }
      if constexpr (SAMPLE) {
#pragma unroll
        for (int i = 0; i < N; ++i) x.mu[i] = fma_(q[i].std, x.eps[i], x.mu[i]);
        write<M>(p.out_z, at, x.mu);
      }
    });
    return sum;
  }
};

template <class T_, bool SAMPLE, bool KLD>
struct PosteriorBackward {
  using T = T_;
  static constexpr bool kSums = false;

  template <class M>
  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool) {
    constexpr int N = M::N;
    Stream stream{};
    if (SAMPLE && p.philox.on) stream = open_stream(p.philox, false, M::listed ? u.skipped : 0);
    const T factor = lit<T>(p.dkl_scale), prior_factor = lit<T>(p.dkl_prior_scale);
    for_packs<M>(p.space, u, [&](const Pack& at) {
      PosteriorPack<T, M, SAMPLE, KLD> x(p, at);
      Bits<T, N> dz_bits, dkl_bits;
      if constexpr (SAMPLE) dz_bits = fetch<T, M>(p.dz, at);
      if constexpr (KLD) dkl_bits = fetch_optional<T, M>(p.dkl, at);
      x.decode_all(p, stream, at);
      Scale<T> q[N];
      T dmu[N] = {}, draw[N] = {};
      scales_of(p.activation, x.raw, q);
      if constexpr (SAMPLE) {
        decode<M>(p.dz, dz_bits, dmu);
#pragma unroll
        for (int i = 0; i < N; ++i) draw[i] = dmu[i] * x.eps[i] * q[i].dstd;
      }
      if constexpr (KLD) {
        T g[N];
        decode_optional<M>(p.dkl, dkl_bits, g);
        visit(p.prior, [&](auto prior) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const auto k = x.template kl<decltype(prior)::value>(q[i], i);
            if constexpr (decltype(prior)::value) {
              const T g_prior = g[i] * prior_factor;
              x.prior_mu[i] = -g_prior * k.dmu;
              x.prior_logvar[i] = g_prior * k.dprior_logvar;
            }
            g[i] *= factor;
            dmu[i] = fma_(g[i], k.dmu, dmu[i]);
            draw[i] = fma_(g[i] * k.dlogvar, q[i].dlogvar, draw[i]);
          }
          if constexpr (decltype(prior)::value) {
            write<M>(p.out_dprior_mu, at, x.prior_mu);
            write<M>(p.out_dprior_logvar, at, x.prior_logvar);
          }
        });
      }
      write<M>(p.out_dmu, at, dmu);
      write<M>(p.out_draw, at, draw);
    });
    return T(0);
  }
};

template <class T_, class L, int NP>
struct Reconstruction {
  using T = T_;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    constexpr int N = M::N;
    const T factor = lit<T>(p.grad_scale);
    T sum = 0;
    for_packs<M>(p.space, u, [&](const Pack& at) {
      Bits<T, N> param_bits[NP];
#pragma unroll
      for (int k = 0; k < NP; ++k) param_bits[k] = fetch<T, M>(p.param[k], at);
      const auto target_bits = fetch<T, M>(p.target, at);
      const auto weight_bits = fetch_optional<T, M>(p.weight, at);
      const auto upstream_bits = fetch_optional<T, M>(p.upstream, at);
      T param[NP][N], target[N], by[N];
#pragma unroll
      for (int k = 0; k < NP; ++k) decode<M>(p.param[k], param_bits[k], param[k]);
      decode<M>(p.target, target_bits, target);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T x[NP];
#pragma unroll
        for (int k = 0; k < NP; ++k) x[k] = param[k][i];
        const auto term = eval_term<L>(x, target[i], p.options);
        target[i] = term.nll;
#pragma unroll
        for (int k = 0; k < NP; ++k) param[k][i] = term.grad[k] * factor;
      }
      if (p.upstream.access != Access::kConstant) {
        decode_optional<M>(p.upstream, upstream_bits, by);
#pragma unroll
        for (int i = 0; i < N * NP; ++i) param[i / N][i % N] *= by[i % N];
      }
      if (p.weight.access != Access::kConstant) {
        decode_optional<M>(p.weight, weight_bits, by);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          target[i] = weighted(by[i], target[i]);
#pragma unroll
          for (int k = 0; k < NP; ++k) param[k][i] = weighted(by[i], param[k][i]);
        }
      }
      T part = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at.holds(i)) part += target[i];
      }
      sum += part;
      write<M>(p.out_nll, at, target);
#pragma unroll
      for (int k = 0; k < NP; ++k) write<M>(p.out_grad[k], at, param[k]);
    });
    return sum;
  }
};

// Gradients that an earlier launch left, times upstream; nothing at all where one number, 1, multiplies all.
template <class T_>
struct Rescale {
  using T = T_;
  static constexpr bool kSums = false;

  template <class M>
  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    constexpr int N = M::N;
    if (p.upstream.access == Access::kScalar) {
      T one[N];
      decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, Pack{p.space, 0, 0, N}), one);
      if (one[0] == T(1)) return 0;
    }
    for_packs<M>(p.space, u, [&](const Pack& at) {
      T upstream[N], grad[N];
      decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, at), upstream);
#pragma unroll 1
      for (int k = 0; k < p.nparams; ++k) {
        if (p.out_grad[k].access == Access::kConstant) continue;
        decode<M>(p.out_grad[k], fetch<T, M>(p.out_grad[k], at), grad);
#pragma unroll
        for (int i = 0; i < N; ++i) grad[i] *= upstream[i];
        write<M>(p.out_grad[k], at, grad);
      }
    });
    return 0;
  }
};

}  // namespace vaefast
