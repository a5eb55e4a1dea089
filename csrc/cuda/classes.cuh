// A class of K: a site's classes are shared out over lanes of a warp, several loads each are under way at once, and
// what there is too much of to be kept is read again, for the gradient, while a cache still has it. No torch types
// here.
#pragma once

#include "cuda/mixture.cuh"

namespace vaefast {

// Classes of a site that a lane takes at once.
constexpr int kClassesAtOnce = 16;

// Lanes that share a site, a power of 2: enough to take all classes at once. Where they do not lie next to each other,
// no more than leave whole sectors of 32 bytes to sites that do.
VF_HD int lanes_of(const ReconstructionProblem& p) {
  const DType dtype = p.param[0].dtype;
  const int most = p.param_step == 1 ? kWarp : dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
  int lanes = 1;
  while (lanes < most && lanes * kClassesAtOnce < p.planes) lanes *= 2;
  return lanes;
}

// Where a lane stands: its site among those of the warp, and which of the site's classes are its own: slice,
// slice + lanes ...
struct Share {
  int site, sites, slice, lanes;
  int away;  // between the lanes of a site

  __device__ Share(const ReconstructionProblem& p, int lane) : lanes(lanes_of(p)) {
    sites = kWarp / lanes;
    const bool beside = p.param_step == 1;
    site = beside ? lane / lanes : lane % sites;
    slice = beside ? lane % lanes : lane / sites;
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

  // f(i, k) for kClassesAtOnce of the lane's classes, k, from `first` on.
  template <class F>
  static __device__ void for_batch(int planes, int lanes, int first, const F& f) {
#pragma unroll
    for (int i = 0; i < kClassesAtOnce; ++i) {
      if (first + i * lanes < planes) f(i, first + i * lanes);
    }
  }

  template <class S>
  static __device__ void read(const S* logits, int64_t step, int planes, int lanes, int first, T (&l)[kClassesAtOnce]) {
#pragma unroll
    for (int i = 0; i < kClassesAtOnce; ++i) l[i] = -lit<T>(HUGE_VAL);
    for_batch(planes, lanes, first, [&](int i, int k) { l[i] = T(load(logits[k * step])); });
  }

  template <class M, class S>
  static __device__ T site(const ReconstructionProblem& p, const Share& share, const Pack& at, bool there) {
    const int planes = p.planes, lanes = share.lanes, stride = kClassesAtOnce * lanes;
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
        read(logits, p.param_step, planes, lanes, first, l);
        // as many steps for all lanes
        all.add(l, (planes - first + share.slice + lanes - 1) / lanes);
      }
    }
    // read by all before any writes a gradient in its place
    const T picked = on ? T(load(logits[(hit < 0 ? 0 : hit) * p.param_step])) : T(0), own = all.most;
    __syncwarp();
    for (int away = share.away; away < share.away * lanes; away *= 2) {
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
        if (on && !once) {
          read(logits, p.param_step, planes, lanes, first, l);
#pragma unroll
          for (int i = 0; i < kClassesAtOnce; ++i) l[i] = exp_(l[i] - all.most);
        }
        for_batch(planes, lanes, first, [&](int i, int k) {
          const T g = scale * fma_(l[i], factor, k == hit ? T(-1) : none);
          grad[k * p.grad_step] = stored<S>(on ? g : T(0));
        });
      }
    }
    if (there && share.slice == 0) write<M>(p.out_nll, at, nll);
    return nll[0];
  }
};

}  // namespace vaefast
