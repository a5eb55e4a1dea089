// The marginals of a batch's aggregate posterior: a thread has a sample, and goes through the batch's posteriors, or
// for a posterior's gradients through samples; what the threads of a block read of them lies in shared memory. No torch
// types here.
#pragma once

#include "cuda/units.cuh"
#include "marginals.h"

namespace vaefast {

// posteriors whose largest exponent is found before any is added
constexpr int kSummed = 8;

// One latent, of the block's.
template <class T>
struct Latent {
  const MarginalsProblem& p;
  const int64_t d;

  __device__ T number(const void* of, int64_t i) const { return static_cast<const T*>(of)[d * p.batch + i]; }
};

// A sample's columns whose weights are not 1.
template <class T>
struct Weighed {
  T column[2], log[2];

  __device__ void bring(const MarginalsProblem& p, int64_t i) {
    for (int k = 0; k < 2; ++k) {
      column[k] = p.column[k] ? static_cast<const T*>(p.column[k])[i] : T(-1);
      log[k] = p.log[k] ? static_cast<const T*>(p.log[k])[i] : T(0);
    }
  }

  __device__ T operator()(T x, int64_t j) const {
    for (int k = 0; k < 2; ++k) x += column[k] == T(j) ? log[k] : T(0);
    return x;
  }
};

// What the threads of a block go through: kThreads posteriors of a latent, or samples.
template <class T>
struct Posteriors {
  T mu[kThreads], slope[kThreads], constant[kThreads];

  __device__ void bring(const Latent<T>& of, int64_t first) {
    const int64_t j = first + threadIdx.x;
    __syncthreads();
    if (j < of.p.batch) {
      mu[threadIdx.x] = of.number(of.p.mu, j);
      slope[threadIdx.x] = of.number(of.p.slope, j);
      constant[threadIdx.x] = of.number(of.p.constant, j);
    }
    __syncthreads();
  }
  __device__ MarginalTerm<T> term(T z, int k) const { return marginal_term(z, mu[k], slope[k], constant[k]); }
};

template <class T>
struct SamplesOfBlock {
  T z[kThreads], marginal[kThreads], g[kThreads];
  Weighed<T> weighed[kThreads];

  __device__ void bring(const Latent<T>& of, int64_t first, int64_t end) {
    const int64_t i = first + threadIdx.x;
    __syncthreads();
    if (i < end) {
      z[threadIdx.x] = of.number(of.p.z, i);
      marginal[threadIdx.x] = of.number(of.p.marginals, i);
      g[threadIdx.x] = static_cast<const T*>(of.p.g)[i];
      weighed[threadIdx.x].bring(of.p, i);
    }
    __syncthreads();
  }
};

// The number of those that are left, of kThreads at most.
__device__ inline int some_of(int64_t left) { return left < kThreads ? int(left) : kThreads; }

template <class T>
__global__ void __launch_bounds__(kThreads) marginals_kernel(const __grid_constant__ MarginalsProblem p) {
  __shared__ Posteriors<T> all;
  const int64_t blocks = (p.batch + kThreads - 1) / kThreads;
  const Latent<T> of{p, blockIdx.x / blocks};
  const int64_t i = blockIdx.x % blocks * kThreads + threadIdx.x, own = i < p.batch ? i : p.batch - 1;
  const T z = of.number(p.z, own);
  Weighed<T> weighed;
  weighed.bring(p, own);
  // the sum as e^top times what has been added up: of these posteriors, and before them
  T top = -lit<T>(sizeof(T) == 8 ? 1.7e308 : 3.4e38), last = 0, before = 0;
  for (int64_t first = 0; first < p.batch; first += kThreads) {
    all.bring(of, first);
    const int n = some_of(p.batch - first);
    for (int k = 0; k < n; k += kSummed) {
      T x[kSummed], most = top;
#pragma unroll
      for (int l = 0; l < kSummed; ++l) {
        const int at = k + l < n ? k + l : k;
        x[l] = k + l < n ? weighed(all.term(z, at).exponent, first + at) : -lit<T>(HUGE_VAL);
        most = most < x[l] ? x[l] : most;
      }
      if (top < most) {
        const T down = exp_(top - most);
        last *= down;
        before *= down;
        top = most;
      }
      T sum = 0;
#pragma unroll
      for (int l = 0; l < kSummed; ++l) sum += exp_(x[l] - top);
      last += sum;
    }
    before += last;
    last = 0;
  }
  if (i < p.batch) static_cast<T*>(p.marginals)[of.d * p.batch + i] = log_(before) + top;
}

// A sample's gradient.
template <class T>
__device__ void sample_gradient(const Latent<T>& of, int64_t i, Posteriors<T>& all) {
  const MarginalsProblem& p = of.p;
  const int64_t own = i < p.batch ? i : p.batch - 1;
  const T z = of.number(p.z, own), marginal = of.number(p.marginals, own), g = static_cast<const T*>(p.g)[own];
  Weighed<T> weighed;
  weighed.bring(p, own);
  double total = 0;
  for (int64_t first = 0; first < p.batch; first += kThreads) {
    all.bring(of, first);
    T sum = 0;
    for (int k = 0; k < some_of(p.batch - first); ++k) {
      const auto [t, x] = all.term(z, k);
      sum = fma_(exp_(weighed(x, first + k) - marginal) * g * t, all.slope[k], sum);
    }
    total += double(sum);
  }
  if (i < p.batch) static_cast<T*>(p.dz)[of.d * p.batch + i] = T(-2 * total);
}

// A posterior's gradients of a chunk of the samples.
template <class T>
__device__ void posterior_gradients(const Latent<T>& of, int64_t j, int64_t chunk, SamplesOfBlock<T>& some) {
  const MarginalsProblem& p = of.p;
  const int64_t own = j < p.batch ? j : p.batch - 1, size = (p.batch + p.chunks - 1) / p.chunks;
  const int64_t end = (chunk + 1) * size < p.batch ? (chunk + 1) * size : p.batch;
  const T mu = of.number(p.mu, own), slope = of.number(p.slope, own), constant = of.number(p.constant, own);
  double of_mu = 0, of_logvar = 0;
  for (int64_t first = chunk * size; first < end; first += kThreads) {
    some.bring(of, first, end);
    MarginalSums<T> sums;
    for (int k = 0; k < some_of(end - first); ++k) {
      const auto [t, x] = marginal_term(some.z[k], mu, slope, constant);
      sums.add(exp_(some.weighed[k](x, own) - some.marginal[k]) * some.g[k], t);
    }
    of_mu += double(sums.moved);
    of_logvar += double(sums.of_logvar);
  }
  if (j >= p.batch) return;
  const int64_t to = (chunk * p.latents + of.d) * p.batch + j;
  static_cast<T*>(p.dmu)[to] = T(2 * double(slope) * of_mu);
  static_cast<T*>(p.dlogvar)[to] = T(of_logvar);
}

// Of each latent the blocks of the samples, then for each chunk those of the posteriors.
template <class T>
__global__ void __launch_bounds__(kThreads) marginals_backward_kernel(const __grid_constant__ MarginalsProblem p) {
  __shared__ Posteriors<T> all;
  __shared__ SamplesOfBlock<T> some;
  const int64_t blocks = (p.batch + kThreads - 1) / kThreads, block = blockIdx.x % blocks, part = blockIdx.x / blocks;
  const Latent<T> of{p, part / (1 + p.chunks)};
  const int64_t own = block * kThreads + threadIdx.x, chunk = part % (1 + p.chunks) - 1;
  chunk < 0 ? sample_gradient(of, own, all) : posterior_gradients(of, own, chunk, some);
}

}  // namespace vaefast
