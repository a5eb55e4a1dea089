// The log density of a mixture of Gaussians (MixtureProblem), in launches one after the other: what the components are
// made of, then a block for each sample and, backward, for each component. All is double. No torch types here.
#pragma once

#include "cuda/alone.cuh"
#include "vmath.h"

namespace vaefast {

enum class MixtureStep {
  kWeights,     // of the logits what makes log weights of them
  kComponents,  // means, 1 / std, and the exponents' constants
  kSamples,     // the values or, backward, shares and the samples' gradients
  kSums,        // what samples add to the components' gradients
  kCollect,     // those, as they were asked for
};

struct MixtureLaunch {
  MixtureProblem problem;
  MixtureStep step = MixtureStep::kWeights;
  int64_t first = 0, count = 0;  // the samples that are computed together
  int log_team = 0;              // of the lanes that share a component, where a block has a sample
  double *mu = nullptr, *root = nullptr, *constant = nullptr;  // [K, D], [K, D], [K]
  double* weights = nullptr;  // [2]: the largest logit, and the logarithm of the sum of e^(logit - that)
  double* shares = nullptr;   // [count, K]: exponents, then p(k | z) g
  double* sums = nullptr;     // [2 D + 1, K], of the samples up to here
};

constexpr double kLargest = 1.7e308;

// The larger one, of [-kLargest, kLargest]: an exponent may be taken less it. Not a NaN.
__device__ inline double top_of(double top, double x) {
  const double most = top < x ? x : top;
  return most > kLargest ? kLargest : most;
}

// f(i) of numbers below n added up by a warp, and their largest.
template <class F>
__device__ double sum_over(int64_t n, const F& f) {
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp) sum += f(i);
  return sum_of_lanes(sum, kWarp);
}
template <class F>
__device__ double top_over(int64_t n, const F& f) {
  double top = -kLargest;
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp) top = top_of(top, f(i));
  join_lanes(top, kWarp, [](double a, double b) { return top_of(a, b); });
  return top;
}

template <class T>
class MixtureOf {
 public:
  const MixtureLaunch& a;
  const MixtureProblem& p;
  const int64_t K, D;
  const int warp, lane;

  __device__ explicit MixtureOf(const MixtureLaunch& a)
      : a(a), p(a.problem), K(p.components), D(p.latents), warp(threadIdx.x / kWarp), lane(threadIdx.x % kWarp) {}

  __device__ static double number(const void* of, int64_t i) { return double(static_cast<const T*>(of)[i]); }
  __device__ double log_weight(int64_t k) const {
    return p.logits ? number(p.logits, k) - a.weights[0] - a.weights[1] : -log_(double(K));
  }
  __device__ double standardized(double z, int64_t at) const { return (z - a.mu[at]) * a.root[at]; }

  // By one warp.
  __device__ void weights() const {
    const auto logit = [&](int64_t k) { return number(p.logits, k); };
    const double top = top_over(K, logit), sum = sum_over(K, [&](int64_t k) { return exp_(logit(k) - top); });
    if (lane > 0) return;
    a.weights[0] = top;
    a.weights[1] = log_(sum);
  }

  // By a warp each.
  __device__ void components() const {
    const int64_t k = int64_t(blockIdx.x) * kWarps + warp;
    if (k >= K) return;
    const double sum = sum_over(D, [&](int64_t d) {
      const double half = -0.5 * number(p.logvars, k * D + d);
      a.mu[k * D + d] = number(p.mus, k * D + d);
      a.root[k * D + d] = exp_(half);
      return half - 0.918938533204672741780;  // log(2 pi) / 2
    });
    if (lane == 0) a.constant[k] = log_weight(k) + sum;
  }

  __device__ void samples(double (&tops)[kThreads], double (&sums)[kThreads], double (&shared)[kWarps][kWarp]) const {
    const int64_t own = blockIdx.x, sample = a.first + own;
    const int size = 1 << a.log_team, teams = kThreads >> a.log_team;
    const int team = threadIdx.x >> a.log_team, slice = threadIdx.x & (size - 1);
    double* shares = a.shares + own * K;
    double top = -kLargest, sum = 0;
    // every lane goes round as often, for they meet
    for (int64_t first = 0; first < K; first += teams) {
      const int64_t k = first + team;
      double x = 0;
      for (int64_t d = slice; k < K && d < D; d += size) {
        const double t = standardized(number(p.z, sample * D + d), k * D + d);
        x = fma_(t, t, x);
      }
      x = sum_of_lanes(x, size);
      if (k >= K) continue;
      x = fma_(-0.5, x, a.constant[k]);
      if (p.backward && slice == 0) shares[k] = x;
      const double most = top_of(top, x);
      sum = fma_(sum, exp_(top - most), exp_(x - most));
      top = most;
    }
    if (slice == 0) tops[team] = top, sums[team] = sum;
    __syncthreads();
    top = top_over(teams, [&](int64_t i) { return tops[i]; });
    sum = sum_over(teams, [&](int64_t i) { return sums[i] * exp_(tops[i] - top); });
    if (!p.backward) {
      if (threadIdx.x == 0) static_cast<T*>(p.value)[sample] = T(log_(sum) + top);
      return;
    }
    const double factor = number(p.g, sample) / sum;
    for (int64_t k = threadIdx.x; k < K; k += kThreads) shares[k] = exp_(shares[k] - top) * factor;
    __syncthreads();
    for (int64_t first = 0; first < D; first += kWarp) {
      const int64_t d = first + lane;
      double dz = 0;
      for (int64_t k = warp; d < D && k < K; k += kWarps) {
        const double t = standardized(number(p.z, sample * D + d), k * D + d);
        dz = fma_(shares[k] * t, a.root[k * D + d], dz);
      }
      dz = sum_of_warps(dz, shared);
      if (d < D && warp == 0) static_cast<T*>(p.dz)[sample * D + d] = T(-dz);
    }
  }

  // A block has kWarp latents of a component, its warps share the samples.
  __device__ void sums(double (&shared)[kWarps][kWarp]) const {
    const int64_t blocks = D > kWarp ? (D + kWarp - 1) / kWarp : 1;
    const int64_t k = blockIdx.x / blocks, d = blockIdx.x % blocks * kWarp + lane;
    double moved = 0, squared = 0, all = 0;
    for (int64_t own = warp; own < a.count; own += kWarps) {
      const double share = a.shares[own * K + k];
      all += share;
      if (d >= D) continue;
      const double t = standardized(number(p.z, (a.first + own) * D + d), k * D + d), of_mean = share * t;
      moved += of_mean;
      squared = fma_(of_mean, t, squared);
    }
    moved = sum_of_warps(moved, shared);
    squared = sum_of_warps(squared, shared);
    all = sum_of_warps(all, shared);
    if (warp > 0) return;
    const auto add = [&](int64_t at, double x) { a.sums[at] = a.first > 0 ? a.sums[at] + x : x; };
    if (d < D) {
      add(k * D + d, a.root[k * D + d] * moved);
      add((K + k) * D + d, 0.5 * (squared - all));
    }
    if (d == 0) add(2 * K * D + k, all);
  }

  // The last block has the logits'.
  __device__ void collect() const {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < K * D) {
      static_cast<T*>(p.dmus)[i] = T(a.sums[i]);
      static_cast<T*>(p.dlogvars)[i] = T(a.sums[K * D + i]);
    }
    if (!p.dlogits || blockIdx.x + 1 < gridDim.x) return;
    const double *of_weights = a.sums + 2 * K * D, total = sum_over(K, [&](int64_t k) { return of_weights[k]; });
    for (int64_t k = threadIdx.x; k < K; k += kThreads) {
      static_cast<T*>(p.dlogits)[k] = T(of_weights[k] - total * exp_(log_weight(k)));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) mixture_kernel(const __grid_constant__ MixtureLaunch a) {
  __shared__ double tops[kThreads], sums[kThreads], shared[kWarps][kWarp];
  const MixtureOf<T> mixture(a);
  switch (a.step) {
    case MixtureStep::kWeights:
      return mixture.weights();
    case MixtureStep::kComponents:
      return mixture.components();
    case MixtureStep::kSamples:
      return mixture.samples(tops, sums, shared);
    case MixtureStep::kSums:
      return mixture.sums(shared);
    case MixtureStep::kCollect:
      return mixture.collect();
  }
}

}  // namespace vaefast
