// What a group of threads does with one unit of work: a stretch of consecutive elements of one row. Each returns its
// thread's part of the unit's sum. No torch types here.
#pragma once

#include "cuda/noise.cuh"
#include "likelihoods.h"
#include "posterior.h"

namespace vaefast {

// Elements [first, limit), shared by `width` threads of which this is number `lane`.
struct Unit {
  int64_t first, limit;
  int lane, width;
};

template <class T, class F>
__device__ inline void for_packs(const Space& space, const Unit& u, F f) {
  constexpr int N = kPack<T>;
  for (int64_t start = u.first + int64_t(u.lane) * N; start < u.limit; start += int64_t(u.width) * N) {
    f(Pack{space, start, int(u.limit - start < N ? u.limit - start : N)});
  }
}

template <class T_, bool SAMPLE, bool KLD>
struct PosteriorForward {
  using T = T_;

  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool first_thread) {
    constexpr int N = kPack<T>;
    Stream stream{};
    if (SAMPLE && p.philox.on) stream = open_stream(p.philox, first_thread);
    T sum = 0;
    for_packs<T>(p.space, u, [&](const Pack& at) {
      T mu[N], raw[N], eps[N], pm[N], plv[N], out[N];
      read(p.mu, at, mu);
      read(p.raw, at, raw);
      if constexpr (SAMPLE) p.philox.on ? read_noise(p.philox, stream, at, eps) : read(p.eps, at, eps);
      if constexpr (KLD) {
        if (p.prior) {
          read(p.prior_mu, at, pm);
          read(p.prior_logvar, at, plv);
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto q = scale_of(p.activation, raw[i]);
        const T m = mu[i];
        if constexpr (SAMPLE) mu[i] = fma_(q.std, eps[i], m);
        if constexpr (KLD) {
          out[i] = p.prior ? kl_of<true>(m, q, pm[i], plv[i]).value : kl_of<false>(m, q, T(0), T(0)).value;
          if (i < at.n) sum += out[i];
        }
      }
      if constexpr (SAMPLE) write(p.out_z, at, mu);
      if constexpr (KLD) write(p.out_kl, at, out);
    });
    return sum;
  }
};

template <class T_, bool SAMPLE, bool KLD>
struct PosteriorBackward {
  using T = T_;

  static __device__ T run(const PosteriorProblem& p, const Unit& u, bool) {
    constexpr int N = kPack<T>;
    Stream stream{};
    if (SAMPLE && p.philox.on) stream = open_stream(p.philox, false);
    const T factor = T(p.dkl_scale);
    for_packs<T>(p.space, u, [&](const Pack& at) {
      T mu[N], raw[N], eps[N], pm[N], plv[N], dz[N], dkl[N];
      read(p.raw, at, raw);
      if constexpr (SAMPLE) {
        read(p.dz, at, dz);
        p.philox.on ? read_noise(p.philox, stream, at, eps) : read(p.eps, at, eps);
      }
      if constexpr (KLD) {
        read(p.mu, at, mu);
        read(p.dkl, at, dkl);
        if (p.prior) {
          read(p.prior_mu, at, pm);
          read(p.prior_logvar, at, plv);
        }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto q = scale_of(p.activation, raw[i]);
        T gmu = 0, graw = 0;
        if constexpr (SAMPLE) {
          gmu = dz[i];
          graw = dz[i] * eps[i] * q.dstd;
        }
        if constexpr (KLD) {
          const T g = dkl[i] * factor;
          const auto k = p.prior ? kl_of<true>(mu[i], q, pm[i], plv[i]) : kl_of<false>(mu[i], q, T(0), T(0));
          gmu = fma_(g, k.dmu, gmu);
          graw = fma_(g * k.dlogvar, q.dlogvar, graw);
          pm[i] = -g * k.dmu;
          plv[i] = g * k.dprior_logvar;
          mu[i] = gmu;
        } else {
          dz[i] = gmu;
        }
        raw[i] = graw;
      }
      if constexpr (KLD) {
        write(p.out_dmu, at, mu);
        write(p.out_dprior_mu, at, pm);
        write(p.out_dprior_logvar, at, plv);
      } else {
        write(p.out_dmu, at, dz);
      }
      write(p.out_draw, at, raw);
    });
    return T(0);
  }
};

template <class T_, class L, int NP>
struct Reconstruction {
  using T = T_;

  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    constexpr int N = kPack<T>;
    const T factor = T(p.grad_scale);
    T sum = 0;
    for_packs<T>(p.space, u, [&](const Pack& at) {
      T param[NP][N], target[N], weight[N], upstream[N];
#pragma unroll
      for (int k = 0; k < NP; ++k) read(p.param[k], at, param[k]);
      read(p.target, at, target);
      if (p.weighted) read(p.weight, at, weight);
      if (p.upstream.data) read(p.upstream, at, upstream);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T x[NP];
#pragma unroll
        for (int k = 0; k < NP; ++k) x[k] = param[k][i];
        const auto term = L::eval(x, target[i]);
        // a zero weight selects zero, it does not multiply by it: what the element held must not matter
        const bool on = !p.weighted || weight[i] != T(0);
        const T w = p.weighted ? weight[i] : T(1);
        const T g = p.upstream.data ? factor * upstream[i] : factor;
        target[i] = on ? w * term.nll : T(0);
        if (i < at.n) sum += target[i];
#pragma unroll
        for (int k = 0; k < NP; ++k) param[k][i] = on ? w * term.grad[k] * g : T(0);
      }
      write(p.out_nll, at, target);
#pragma unroll
      for (int k = 0; k < NP; ++k) write(p.out_grad[k], at, param[k]);
    });
    return sum;
  }
};

}  // namespace vaefast
