// A class of K: a site's classes are shared out over lanes of a warp, several loads each are under way at once, and
// what there is too much of to be kept is read again, for the gradient, while a cache still has it. No torch types
// here.
#pragma once

#include "cuda/mixture.cuh"

namespace vaefast {

// Classes of a site that a lane takes at once.
constexpr int kClassesAtOnce = 12;

// Lanes that share a site, their logarithm: enough to take all classes at once. Where they do not lie next to each
// other, no more than leave whole sectors of 32 bytes to sites that do.
VF_HD int log_lanes_of(const ReconstructionProblem& p) {
  const DType dtype = p.param[0].dtype;
  const int most = p.param_step == 1 ? 5 : dtype == DType::kDouble ? 3 : dtype == DType::kFloat ? 2 : 1;
  int log = 0;
  while (log < most && (kClassesAtOnce << log) < p.planes) ++log;
  return log;
}

// Where a lane stands: its site among those of the warp, and which of the site's classes are its own: slice,
// slice + lanes ...
struct Share {
  int log, lanes;
  int site, sites, slice;
  int away;  // between the lanes of a site

  __device__ Share(const ReconstructionProblem& p, int lane) : log(log_lanes_of(p)), lanes(1 << log) {
    sites = kWarp >> log;
    const bool beside = p.param_step == 1;
    site = beside ? lane >> log : lane & (sites - 1);
    slice = beside ? lane & (lanes - 1) : lane >> (5 - log);
    away = beside ? 1 : sites;
  }
};

template <class T_, class L>
struct Mixture<T_, L, 0> {
  using T = T_;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    const Share share(p, u.lane % kWarp);
    const DType dtype = p.param[0].dtype;
    if constexpr (sizeof(T) == 8) {
      if (dtype == DType::kDouble) return sites<M, double>(p, u, share);
    }
    if (dtype == DType::kFloat) return sites<M, float>(p, u, share);
    return dtype == DType::kHalf ? sites<M, __half>(p, u, share) : sites<M, __nv_bfloat16>(p, u, share);
  }

 private:
  template <class M, class S>
  static __device__ T sites(const ReconstructionProblem& p, const Unit& u, const Share& share) {
    T sum = 0;
    // every lane of a warp goes round as often, for they meet in shuffles
#pragma unroll 1
    for (int64_t first = u.first + u.lane / kWarp * share.sites; first < u.limit;
         first += u.width / kWarp * share.sites) {
      const bool there = first + share.site < u.limit;
      Pack at{p.space, there ? first + share.site : first, 0, 1};
      if (p.space.views) divide(p.space, at.start, p.space.size[p.space.ndim - 1], at.outer, at.column);
      const T nll = site<M, S>(p, share, at, there);
      if (there && share.slice == 0) sum += nll;
    }
    return sum;
  }

  // kClassesAtOnce of a lane's classes, of which there are `own`; for the lane that has most of them, `most`.
  struct Batch {
    int first, own, most;

    __device__ Batch(int planes, const Share& share, int first)
        : first(first),
          own((planes - first + share.lanes - 1) >> share.log),
          most((planes - first + share.slice + share.lanes - 1) >> share.log) {}
  };

  // f(i, whether the lane has so many), by fours as far as any lane has one
  template <class F>
  static __device__ void for_batch(const Batch& b, const F& f) {
#pragma unroll
    for (int i = 0; i < kClassesAtOnce; ++i) {
      if (i % 4 == 0 && i >= b.most) break;
      f(i, i < b.own);
    }
  }

  template <class S>
  static __device__ void read(const S* logits, int64_t step, const Share& share, const Batch& b,
                              T (&l)[kClassesAtOnce]) {
    const S* from = logits + b.first * step;
    step <<= share.log;
#pragma unroll
    for (int i = 0; i < kClassesAtOnce; ++i) l[i] = -lit<T>(HUGE_VAL);
    for_batch(b, [&](int i, bool there) {
      if (there) l[i] = T(load(*from));
      from += step;
    });
  }

  template <class M, class S>
  static __device__ T site(const ReconstructionProblem& p, const Share& share, const Pack& at, bool there) {
    const int planes = p.planes, stride = kClassesAtOnce << share.log;
    T weight[1], upstream[1], nll[1] = {};
    decode_optional<M>(p.weight, fetch_optional<T, M>(p.weight, at), weight);
    decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, at), upstream);
    const bool on = weight[0] != T(0), once = stride >= planes;
    const S* logits = static_cast<const S*>(p.param[0].data) + site_offset(p.param[0], at);
    const T x = load_element<T>(p.target, site_offset(p.target, at));
    // -1, and no number for a result, where there is no such class
    const int hit = x >= T(0) && x < T(planes) && x == T(int(x)) ? int(x) : -1;
    const T none = hit < 0 ? lit<T>(__builtin_nan("")) : T(0);

    LogSumExp<T> all;
    T l[kClassesAtOnce];
    if (on) {
#pragma unroll 1
      for (int first = share.slice; first < planes; first += stride) {
        const Batch batch(planes, share, first);
        read(logits, p.param_step, share, batch, l);
        all.add(l, batch.most);
      }
    }
    // read by all before any writes a gradient in its place
    const T picked = on ? T(load(logits[(hit < 0 ? 0 : hit) * p.param_step])) : T(0), own = all.most;
    __syncwarp();
    for (int away = share.away; away < share.away * share.lanes; away *= 2) {
      all.add(LogSumExp<T>{__shfl_xor_sync(0xffffffffu, all.most, away), __shfl_xor_sync(0xffffffffu, all.sum, away)});
    }
    if (on) nll[0] = weight[0] * (log_(all.sum) - (picked - all.most) + none);
    if (there && p.grad) {
      S* grad = static_cast<S*>(p.out_grad[0].data) + site_offset(p.out_grad[0], at);
      const T scale = lit<T>(p.grad_scale) * weight[0] * upstream[0], inverse = T(1) / all.sum;
      // what the lane's exponentials, while it still has them, are less than the site's
      const T factor = once ? exp_(own - all.most) * inverse : inverse;
#pragma unroll 1
      for (int first = share.slice; first < planes; first += stride) {
        const Batch batch(planes, share, first);
        if (on && !once) {
          read(logits, p.param_step, share, batch, l);
          for_batch(batch, [&](int i, bool) { l[i] = exp_(l[i] - all.most); });
        }
        S* to = grad + first * p.grad_step;
        const int64_t step = p.grad_step << share.log;
        const int at = (hit - first) >> share.log,
                  mine = hit >= 0 && ((hit ^ first) & (share.lanes - 1)) == 0 ? at : -1;
        for_batch(batch, [&](int i, bool own) {
          const T g = on ? scale * fma_(l[i], factor, i == mine ? T(-1) : none) : T(0);
          if (own) *to = stored<S>(g);
          to += step;
        });
      }
    }
    if (there && share.slice == 0) write<M>(p.out_nll, at, nll);
    return nll[0];
  }
};

}  // namespace vaefast
