// A class of K: a team of threads has a site, each some of its classes. Logits are read in lines of memory where they
// allow it, several at a time, and again for the gradient, from a cache. No torch types here.
#pragma once

#include "cuda/mixture.cuh"

namespace vaefast {

// Logits that a thread takes at once at most, and as many as it is to have of a site's where a block has threads
// enough: what it reads twice, for the sum and for the gradient, then still lies in a cache.
template <class T>
constexpr int kAtOnce = sizeof(T) == 4 ? 12 : 8;
constexpr int kShare = 32;

// Threads of a team, their logarithm.
VF_HD int log_team_of(const ReconstructionProblem& p) {
  int log = 0;
  if (p.param_step != 1) {
    while (log < 3 && (kShare << log) < p.planes) ++log;
    return log;
  }
  // lanes next to each other, at least four of which share a line; single classes are more scattered the more a lane
  // has
  const int chunks = p.planes / p.chunk;
  const auto share = [&] { return p.chunk > 1 ? log < 2 ? 1 : kShare / p.chunk : log < 5 ? 12 : kShare; };
  while (log < 8 && (share() << log) < chunks) ++log;
  return log;
}

// The threads that share a site: lanes next to each other (ALONG) or, where sites are what lies next to each other, the
// same lane of several warps. What follows from log and thread is computed where it is used, and takes no registers.
template <bool ALONG>
struct Team {
  int log, thread;

  __device__ Team(int wanted, const Unit& u) : thread(u.lane) {
    const int most = u.width == kThreads ? wanted : ALONG ? 5 : 0;
    log = wanted < most ? wanted : most;
  }

  __device__ int size() const { return 1 << log; }
  // it takes so many of each
  __device__ int lanes() const { return !ALONG ? 1 : log < 5 ? size() : kWarp; }
  __device__ int warps() const { return !ALONG ? size() : log < 5 ? 1 : size() / kWarp; }
  // this thread's number
  __device__ int slice() const { return (ALONG ? thread : thread / kWarp) & (size() - 1); }
  // this thread's site, of those that a unit's teams take at once
  __device__ int site() const { return ALONG ? thread >> log : (thread / kWarp >> log) * kWarp + thread % kWarp; }
};

__device__ inline float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return ::fmax(a, b); }

// e^x for x <= 0, whose relative error is at most 2^-22 + |x| 2^-24: a share of 1 by it, and the logarithm of a sum of
// them, is right to 1e-6. Of exp_'s eight instructions these are two. A denormal is 0.
__device__ inline float exp_of_share(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 1.4426950408889634f));
  return out;
#else
  return exp_(x);
#endif
}
__device__ inline double exp_of_share(double x) { return exp_(x); }

// What warps leave for each other, for each of two sums.
template <class T>
using Shared = T[2][kThreads / kWarp][kWarp];

// f over what each of so many lanes next to each other has, in all of them.
template <class T, class F>
__device__ __forceinline__ void join_lanes(T& x, int lanes, const F& f) {
#pragma unroll 1
  for (int away = 1; away < lanes; away *= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, away));
}

// f over what the team's threads have, in all of them. shared: not written again before every thread has come to
// another barrier.
template <class T, bool ALONG, class F>
__device__ __forceinline__ void join(T& x, const Team<ALONG>& team, T (&shared)[kThreads / kWarp][kWarp], const F& f) {
  join_lanes(x, team.lanes(), f);
  if (team.warps() == 1) return;
  const int warp = team.thread / kWarp, lane = team.thread % kWarp, slot = ALONG ? 0 : lane;
  if (!ALONG || lane == 0) shared[warp][slot] = x;
  __syncthreads();
  const int first = warp & -team.warps();
  x = shared[first][slot];
#pragma unroll 1
  for (int k = 1; k < team.warps(); ++k) x = f(x, shared[first + k][slot]);
}

// On to the next of several addresses, each computed from the one before: all at once they would take registers.
template <class S>
__device__ __forceinline__ void advance(S*& at, int64_t step) {
  at += step;
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(at));
#endif
}

// Chunks of W logits of type S, which one instruction moves: W classes of a site where classes lie next to each other
// (ALONG), else a class of W sites.
template <class T, class S, int W, bool ALONG>
struct Classes {
  static constexpr int kSites = ALONG ? 1 : W, kChunks = kAtOnce<T> / W, kEach = kChunks * W / kSites;
  using M = Move<kSites>;
  using C = Chunk<S, W>;

  const ReconstructionProblem& p;
  const Team<ALONG> team;
  const int chunks;
  T l[kSites][kEach];  // logits of a few classes, and then their exponentials

  __device__ __forceinline__ Classes(const ReconstructionProblem& p, const Unit& u)
      : p(p), team(log_team_of(p), u), chunks(ALONG ? p.planes / W : p.planes) {}

  // The team's chunks are first, first + 1 ...; this thread has those from first + slice on, one for each of the team.
  __device__ __forceinline__ int own(int first) const {
    return (chunks - first - team.slice() + team.size() - 1) >> team.log;
  }
  // where the first of them is, and how far it is to the next
  __device__ __forceinline__ int64_t offset(int first, int64_t step) const {
    return (first + team.slice()) * (ALONG ? W * step : step);
  }
  __device__ __forceinline__ int64_t next(int64_t step) const { return (ALONG ? W * step : step) << team.log; }

  // f(i) for as many chunks as the thread has, and as make whole fours
  template <class F>
  static __device__ __forceinline__ void for_chunks(int own, const F& f) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (i % 4 == 0 && i >= own) break;
      f(i);
    }
  }

  // the place in l of chunk i's number w
  __device__ __forceinline__ T& number(int i, int w) {
    return ALONG ? l[0][i * W + w] : l[ALONG ? 0 : w][ALONG ? 0 : i];
  }

  __device__ __forceinline__ void read(const S* from, int own) {
    const int64_t step = next(p.param_step);
    for_chunks(own, [&](int i) {
      C c;
#pragma unroll
      for (int w = 0; w < W; ++w) c.item[w] = stored<S>(-lit<T>(HUGE_VAL));
      if (i < own) c = *reinterpret_cast<const C*>(from);
      advance(from, step);
#pragma unroll
      for (int w = 0; w < W; ++w) number(i, w) = T(load(c.item[w]));
    });
  }

  // l becomes e^(l - most)
  __device__ __forceinline__ void exponentiate(const T (&most)[kSites], int own) {
    for_chunks(own, [&](int i) {
#pragma unroll
      for (int w = 0; w < W; ++w) number(i, w) = exp_of_share(number(i, w) - most[ALONG ? 0 : w]);
    });
  }

  // Adds what was read to sums of e^(l - most), and leaves that in l.
  __device__ __forceinline__ void add(T (&most)[kSites], T (&sum)[kSites], int own) {
    T more[kSites] = {}, top[kSites];
#pragma unroll
    for (int s = 0; s < kSites; ++s) top[s] = most[s];
    for_chunks(own, [&](int i) {
#pragma unroll
      for (int w = 0; w < W; ++w) top[ALONG ? 0 : w] = larger(top[ALONG ? 0 : w], number(i, w));
    });
    exponentiate(top, own);
    for_chunks(own, [&](int i) {
#pragma unroll
      for (int w = 0; w < W; ++w) more[ALONG ? 0 : w] += number(i, w);
    });
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
      sum[s] = fma_(sum[s], exp_(most[s] - top[s]), more[s]);
      most[s] = top[s];
    }
  }

  // Stores factor * l, and what hit has besides, less.
  __device__ __forceinline__ void store(S* to, int first, int own, const T (&factor)[kSites], const T (&less)[kSites],
                                        const int (&hit)[kSites]) {
    int mine[kSites];  // the hit among the thread's
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
      const int chunk = (ALONG ? hit[s] / W : hit[s]) - first - team.slice();
      const bool here = hit[s] >= 0 && chunk >= 0 && (chunk & (team.size() - 1)) == 0;
      mine[s] = here ? (chunk >> team.log) * (ALONG ? W : 1) + (ALONG ? hit[s] % W : 0) : -1;
    }
    const int64_t step = next(p.grad_step);
    for_chunks(own, [&](int i) {
      C c;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const int s = ALONG ? 0 : w;
        const bool hit = mine[s] == (ALONG ? i * W + w : i);
        c.item[w] = stored<S>(fma_(number(i, w), factor[s], hit ? -less[s] : T(0)));
      }
      if (i < own) *reinterpret_cast<C*>(to) = c;
      advance(to, step);
    });
  }

  // Gradients of a site that does not count, whatever its logits are.
  __device__ __forceinline__ void erase(S* grad) {
#pragma unroll 1
    for (int k = team.slice(); k < p.planes; k += team.size()) grad[k * p.grad_step] = stored<S>(T(0));
  }

  // The nll of the sites at `at`, in the team's first thread.
  __device__ __forceinline__ T site(const Pack& at, bool there, Shared<T>& shared) {
    // on its way while the logits are read
    const auto target_bits = fetch<T, M>(p.target, at);
    const S* logits = static_cast<const S*>(p.param[0].data) + site_offset(p.param[0], at);
    T most[kSites], sum[kSites] = {}, top[kSites];
#pragma unroll
    for (int s = 0; s < kSites; ++s) most[s] = -lit<T>(3e38);  // finite: -inf less -inf is no number
    const int stride = kChunks << team.log;
#pragma unroll 1
    for (int first = 0; first < chunks; first += stride) {
      read(logits + offset(first, p.param_step), own(first));
      add(most, sum, own(first));
    }
    T weight[kSites], target[kSites], nll[kSites], picked[kSites];
    int hit[kSites];  // -1 where there is no such class
    decode<M>(p.target, target_bits, target);
    decode_optional<M>(p.weight, fetch_optional<T, M>(p.weight, at), weight);
    // read before any thread of the team writes a gradient in its place
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
      const T x = target[s];
      hit[s] = x >= T(0) && x < T(p.planes) && x == T(int(x)) ? int(x) : -1;
      picked[s] = hit[s] < 0 ? lit<T>(__builtin_nan("")) : T(load(logits[hit[s] * p.param_step + s]));
    }
#pragma unroll
    for (int s = 0; s < kSites; ++s) top[s] = most[s];
    if constexpr (kSites == 1) join(top[0], team, shared[0], [](T a, T b) { return larger(a, b); });
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
      most[s] = exp_(most[s] - top[s]);
      sum[s] *= most[s];
    }
    if constexpr (kSites == 1) join(sum[0], team, shared[1], [](T a, T b) { return a + b; });
    T total = 0;
#pragma unroll
    for (int s = 0; s < kSites; ++s) {
      nll[s] = weighted(weight[s], log_(sum[s]) - (picked[s] - top[s]));
      total += nll[s];
    }
    __syncwarp();
    if (!there) return 0;
    if (team.slice() == 0) write<M>(p.out_nll, at, nll);
    if (p.grad) {
      // l is still what the thread's own largest logit made it, where that were all its classes
      const bool once = stride >= chunks;
      T upstream[kSites], factor[kSites], less[kSites];
      decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, at), upstream);
#pragma unroll
      for (int s = 0; s < kSites; ++s) {
        less[s] = lit<T>(p.grad_scale) * weight[s] * upstream[s];
        factor[s] = hit[s] < 0 ? lit<T>(__builtin_nan("")) : less[s] * ((once ? most[s] : T(1)) / sum[s]);
      }
      S* grad = static_cast<S*>(p.out_grad[0].data) + site_offset(p.out_grad[0], at);
#pragma unroll 1
      for (int first = 0; first < chunks; first += stride) {
        if (!once) {
          read(logits + offset(first, p.param_step), own(first));
          exponentiate(top, own(first));
        }
        if (kSites > 1 || weight[0] != T(0)) {
          store(grad + offset(first, p.grad_step), first, own(first), factor, less, hit);
        }
      }
#pragma unroll
      for (int s = 0; s < kSites; ++s) {
        if (weight[s] == T(0)) erase(grad + s);
      }
    }
    return team.slice() == 0 ? total : T(0);
  }

  __device__ __forceinline__ T sites(const Unit& u, Shared<T>& shared) {
    T sum = 0;
    // every thread of a unit goes round as often, for they meet
#pragma unroll 1
    for (int64_t first = u.first; first < u.limit; first += (u.width >> team.log) * kSites) {
      const int64_t start = first + team.site() * kSites;
      const bool there = start < u.limit;
      Pack at{p.space, there ? start : first, 0, kSites};
      if (p.space.views) divide(p.space, at.start, p.space.size[p.space.ndim - 1], at.outer, at.column);
      sum += site(at, there, shared);
    }
    return sum;
  }
};

// Of logits that are kept as S.
template <class T_, class S>
struct ClassWork {
  using T = T_;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ __forceinline__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    __shared__ Shared<T> shared;
    const bool along = p.param_step == 1;
    if constexpr (sizeof(T) == 4) {
      if (p.chunk > 1) {
        return along ? Classes<T, S, 16 / sizeof(S), true>(p, u).sites(u, shared)
                     : Classes<T, S, 2, false>(p, u).sites(u, shared);
      }
    }
    return along ? Classes<T, S, 1, true>(p, u).sites(u, shared) : Classes<T, S, 1, false>(p, u).sites(u, shared);
  }
};

template <class T, class S>
constexpr bool kMixtureWork<ClassWork<T, S>> = true;

}  // namespace vaefast
