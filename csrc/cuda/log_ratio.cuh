// The log density ratios of draws. Forward a row is a sum, as a job's; backward a block has the numbers of the
// posterior that a warp's lanes take, and its warps share the draws. No torch types here.
#pragma once

#include "cuda/alone.cuh"
#include "log_ratio.h"

namespace vaefast {

// q's or p's numbers at one latent of a sample.
template <class T>
__device__ __forceinline__ Standardized<T> standardized(const GaussianNumbers& g, int64_t at, T z) {
  const auto number = [&](const void* of) { return static_cast<const T*>(of)[at]; };
  return standardized(z - number(g.mu), number(g.root), number(g.logvar));
}

template <class T, DrawPrior P>
__device__ __forceinline__ Standardized<T> under_prior(const LogRatioProblem& p, int64_t at, T z) {
  if constexpr (P == DrawPrior::kGiven) {
    return standardized(p.p, at, z);
  } else {
    return {z, T(1), P == DrawPrior::kNone ? T(0) : z * z};
  }
}

// Rows of the sums that are twice the ratios.
struct LogRatioRows : LogRatioProblem {
  Sum sum;
};

template <class T_, DrawPrior P>
struct LogRatioWork {
  using T = T_;
  using Problem = LogRatioRows;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ T run(const LogRatioRows& p, const Unit& u, bool) {
    // a unit is of one row
    const int64_t to_posterior = (u.first / p.latents % p.samples - u.first / p.latents) * p.latents;
    T sum = 0;
    for (int64_t i = u.first + u.lane; i < u.limit; i += u.width) {
      const T z = static_cast<const T*>(p.z)[i];
      sum += standardized(p.q, i + to_posterior, z).twice - under_prior<T, P>(p, i + to_posterior, z).twice;
    }
    return sum;
  }
};

template <class T, DrawPrior P>
constexpr bool kMixtureWork<LogRatioWork<T, P>> = true;

// A gradient of the posterior's or the prior's: sums over the draws that a warp has, in chains that are short.
template <class T>
struct OverDraws {
  T chain = 0;
  double sum = 0;

  __device__ void flush() {
    sum += double(chain);
    chain = 0;
  }
};

template <class T, DrawPrior P>
__global__ void __launch_bounds__(kThreads) log_ratio_backward_kernel(const __grid_constant__ LogRatioProblem p) {
  constexpr bool given = P == DrawPrior::kGiven;
  constexpr int kChain = 64;
  __shared__ double shared[kWarps][kWarp];
  const int64_t numbers = p.samples * p.latents, at = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool there = at < numbers;
  const int64_t sample = there ? at / p.latents : 0;
  OverDraws<T> of_mu, of_logvar, of_prior_mu, of_prior_logvar;
  int left = kChain;
  for (int64_t k = threadIdx.x / kWarp; there && k < p.draws; k += kWarps) {
    const T z = static_cast<const T*>(p.z)[k * numbers + at], up = static_cast<const T*>(p.g)[k * p.samples + sample];
    const auto of_q = slopes_of(standardized(p.q, at, z));
    of_mu.chain += up * of_q.mu;
    of_logvar.chain += up * of_q.logvar;
    T slope = of_q.mu;
    if constexpr (P != DrawPrior::kNone) {
      const auto of_prior = slopes_of(under_prior<T, P>(p, at, z));
      slope -= of_prior.mu;
      of_prior_mu.chain += up * of_prior.mu;
      of_prior_logvar.chain += up * of_prior.logvar;
    }
    static_cast<T*>(p.dz)[k * numbers + at] = up * slope;
    if (--left > 0 && k + kWarps < p.draws) continue;
    left = kChain;
    of_mu.flush(), of_logvar.flush(), of_prior_mu.flush(), of_prior_logvar.flush();
  }
  const auto finish = [&](const OverDraws<T>& of, void* out, double factor) {
    if (!out) return;
    const double sum = sum_of_warps(of.sum, shared);
    if (there && threadIdx.x < kWarp) static_cast<T*>(out)[at] = T(factor * sum);
  };
  finish(of_mu, p.dmu, -1);
  finish(of_logvar, p.dlogvar, -0.5);
  if constexpr (given) {
    finish(of_prior_mu, p.dprior_mu, 1);
    finish(of_prior_logvar, p.dprior_logvar, 0.5);
  }
}

}  // namespace vaefast
