// A class of K: a site's classes are shared out over the lanes of a warp, so that lanes next to each other read what
// lies next to each other, several loads each are under way at once, and the second reading, for the gradient, finds
// what the warp has just read in a cache. No torch types here.
#pragma once

#include "cuda/mixture.cuh"

namespace vaefast {

// Lanes that share a site, a power of 2: where its classes lie next to each other, as many as have something to do;
// else those that sites next to each other, in a sector of 32 bytes, leave.
VF_HD int lanes_of(const ReconstructionProblem& p) {
  if (p.param_step != 1) {
    const int size = p.param[0].dtype == DType::kDouble ? 8 : p.param[0].dtype == DType::kFloat ? 4 : 2;
    return size;  // 32 / (32 bytes / size)
  }
  int lanes = kWarp;
  while (lanes > 1 && lanes >= p.planes) lanes /= 2;
  return lanes;
}

// Where a lane stands: its site among those of the warp, and its share of the site's classes.
struct Share {
  int site, sites, slice, lanes;
  int step;  // between the lanes of a site

  __device__ explicit Share(const ReconstructionProblem& p, int lane) : lanes(lanes_of(p)) {
    sites = kWarp / lanes;
    const bool beside = p.param_step == 1;
    site = beside ? lane / lanes : lane % sites;
    slice = beside ? lane % lanes : lane / sites;
    step = beside ? 1 : sites;
  }

  // f(what the lane `step` away in the site holds), for a butterfly over the site's lanes
  template <class F>
  __device__ void butterfly(const F& f) const {
    for (int away = step; away < step * lanes; away *= 2) f(away);
  }
};

template <class T_, class L>
struct Mixture<T_, L, 0> {
  using T = T_;
  static constexpr bool kSums = true;
  static constexpr int kAtOnce = 8;

  template <class M>
  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    const Share share(p, u.lane % kWarp);
    T sum = 0;
    // every lane of a warp goes round as often, for they meet in shuffles
    for (int64_t first = u.first + u.lane / kWarp * share.sites; first < u.limit;
         first += u.width / kWarp * share.sites) {
      const int64_t element = first + share.site;
      const bool there = element < u.limit;
      Pack at{p.space, there ? element : first, 0, 1};
      if (p.space.views) divide(p.space, at.start, p.space.size[p.space.ndim - 1], at.outer, at.column);
      const T nll = site<M>(p, share, at, there);
      if (there && share.slice == 0) sum += nll;
    }
    return sum;
  }

 private:
  // f(k, logits of classes k, k + lanes ..) over a lane's share of the site's classes, kAtOnce at a time.
  template <class F>
  static __device__ void for_classes(const ReconstructionProblem& p, const Share& share, int64_t offset, const F& f) {
#pragma unroll 1
    for (int k = share.slice; k < p.planes; k += kAtOnce * share.lanes) {
      T l[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = k + i * share.lanes;
        l[i] = at < p.planes ? load_element<T>(p.param[0], offset + at * p.param_step) : -lit<T>(HUGE_VAL);
      }
      f(k, l);
    }
  }

  template <class M>
  static __device__ T site(const ReconstructionProblem& p, const Share& share, const Pack& at, bool there) {
    T weight[1], upstream[1];
    decode_optional<M>(p.weight, fetch_optional<T, M>(p.weight, at), weight);
    decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, at), upstream);
    const bool on = weight[0] != T(0);
    const T x = load_element<T>(p.target, site_offset(p.target, at));
    const int64_t offset = site_offset(p.param[0], at), grad = site_offset(p.out_grad[0], at);

    LogSumExp<T> all;
    T picked = 0;
    int found = 0;
    if (on) {
      for_classes(p, share, offset, [&](int k, const T(&l)[kAtOnce]) {
        all.add(l);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = k + i * share.lanes;
          if (x == T(at) && at < p.planes) {
            picked = l[i];
            found = 1;
          }
        }
      });
    }
    share.butterfly([&](int away) {
      all.add(LogSumExp<T>{__shfl_xor_sync(0xffffffffu, all.most, away), __shfl_xor_sync(0xffffffffu, all.sum, away)});
      picked += __shfl_xor_sync(0xffffffffu, picked, away);
      found += __shfl_xor_sync(0xffffffffu, found, away);
    });
    // no number where there is no such class
    const T none = found ? T(0) : lit<T>(__builtin_nan(""));
    const T nll[1] = {on ? weight[0] * (log_(all.sum) - (picked - all.most) + none) : T(0)};
    if (there && p.grad) {
      const T scale = lit<T>(p.grad_scale) * weight[0] * upstream[0], inverse = T(1) / all.sum;
      for_classes(p, share, offset, [&](int k, const T(&l)[kAtOnce]) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = k + i * share.lanes;
          if (at >= p.planes) break;
          const T hit = x == T(at) ? T(1) : none;
          const T g = on ? scale * fma_(exp_(l[i] - all.most), inverse, -hit) : T(0);
          store_element(p.out_grad[0], grad + at * p.grad_step, g);
        }
      });
    }
    if (there && share.slice == 0) write<M>(p.out_nll, at, nll);
    return nll[0];
  }
};

}  // namespace vaefast
