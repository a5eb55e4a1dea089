// Categorical latents: lanes of a warp share a site where its classes lie next to each other, else each lane has one.
// A lane's classes are taken one after the other, and again for each pass over them: from a cache, if they are several.
// No torch types here.
#pragma once

#include "categorical.h"
#include "cuda/alone.cuh"

namespace vaefast {

// Lanes of a team, their logarithm.
VF_HD int log_team_of(const CategoricalProblem& p) {
  int log = 0;
  while (p.logits_step == 1 && log < 5 && (1 << log) < p.classes) ++log;
  return log;
}

// A site's classes by as many at a time as the team has lanes.
template <class T>
struct SiteOfTeam {
  using V = T;

  struct Numbers {
    T own;
    __device__ T at(int) const { return own; }
    __device__ void put(int, T x) { own = x; }
  };

  const Team<true>& team;
  const Pack& place;
  const bool there;

  __device__ int piece() const { return team.size(); }
  template <class F>
  __device__ void for_each(int, const F& f) const {
    f(0);
  }

  __device__ void read(const Operand& op, int64_t step, int64_t first, int count, Numbers& to, double missing) const {
    const int k = team.slice();
    to.own = k >= count ? lit<T>(missing)
             : op.data  ? load_element<T>(op, element(op, step, first + k))
                        : lit<T>(op.value);
  }
  __device__ void write(const Operand& op, int64_t step, int64_t first, int count, const Numbers& from) const {
    const int k = team.slice();
    if (there && op.data && k < count) store_element(op, element(op, step, first + k), from.own);
  }
  __device__ int64_t element(const Operand& op, int64_t step, int64_t k) const {
    return site_offset(op, place) + k * step;
  }

  template <class X, class F>
  __device__ X joined(X x, const F& f) const {
    join_lanes(x, team.size(), f);
    return x;
  }
  template <class X>
  __device__ X sum(X x) const {
    return sum_of_lanes(x, team.size());
  }
  __device__ T most(T x) const {
    return joined(x, [](T a, T b) { return larger(a, b); });
  }

  // With those of the lanes before this one.
  __device__ double sum_up_to_here(double x) const {
#pragma unroll 1
    for (int away = 1; away < team.size(); away *= 2) {
      const double before = __shfl_up_sync(0xffffffffu, x, away);
      if (team.slice() >= away) x += before;
    }
    return x;
  }
};

// A one-hot vector by the inverse of the distribution function: the first class of those that there are up to which
// there is more than a uniform number of [0, 1) times the whole.
template <class T, bool MIXED>
__device__ void draw(Sites<SiteOfTeam<T>, MIXED>& sites, const SiteOfTeam<T>& site, const CategoricalProblem& p) {
  const int64_t none = p.classes;
  int64_t k = site.team.slice(), found = none, last = 0;
  const auto weight = [&](int i) { return k < p.classes ? double(sites.weight(i)) : 0.0; };
  double whole = 0, sum = 0;
  sites.pass([&](int i) {
    whole += site.sum(weight(i));
    k += site.piece();
  });
  const double uniform = static_cast<const double*>(p.uniforms.data)[site_offset(p.uniforms, site.place)];
  const double at = whole * (uniform * kBelowOne);
  k = site.team.slice();
  sites.pass([&](int i) {
    const double own = weight(i);
    if (own > 0) last = k;
    const bool beyond = sum + site.sum_up_to_here(own) > at;
    if (own > 0 && beyond && k < found) found = k;
    sum += site.sum(own);
    k += site.piece();
  });
  found = site.joined(found, [](int64_t a, int64_t b) { return a < b ? a : b; });
  // added up in another order, they may not come to it
  last = site.joined(last, [](int64_t a, int64_t b) { return a < b ? b : a; });
  if (found == none) found = last;
  if (!site.there) return;
  const T one = T(whole - whole + 1);  // NaN where the whole is
  for (k = site.team.slice(); k < p.classes; k += site.piece()) {
    store_element(p.out_z, site.element(p.out_z, p.out_z_step, k), k == found ? one : T(0));
  }
}

template <class T_, bool MIXED, bool BACKWARD>
struct CategoricalWork {
  using T = T_;
  using Problem = CategoricalProblem;
  static constexpr bool kSums = !BACKWARD;

  template <class M>
  static __device__ T run(const CategoricalProblem& p, const Unit& u, bool) {
    const Team<true> team(log_team_of(p), u);
    T sum = 0;
    // every lane of a warp goes round as often, for they meet
#pragma unroll 1
    for (int64_t first = u.first; first < u.limit; first += u.width >> team.log) {
      const int64_t start = first + team.site();
      const bool there = start < u.limit;
      Pack at{p.space, there ? start : first, 0, 1};
      if (p.space.views) divide(p.space, at.start, p.space.size[p.space.ndim - 1], at.outer, at.column);
      const SiteOfTeam<T> site{team, at, there};
      Sites<SiteOfTeam<T>, MIXED> sites(p, site);
      sites.sum_up();
      if constexpr (BACKWARD) {
        T dkl[1] = {};
        if (p.kl) decode_optional<M>(p.dkl, fetch_optional<T, M>(p.dkl, at), dkl);
        sites.differentiate(dkl[0] * lit<T>(p.dkl_scale), dkl[0] * lit<T>(p.dkl_prior_scale));
      } else {
        if (p.out_z.data) draw(sites, site, p);
        if (!p.kl) continue;
        const T kl[1] = {sites.kl()};
        if (!there || team.slice() != 0) continue;
        sum += kl[0];
        write<M>(p.out_kl, at, kl);
      }
    }
    return sum;
  }
};

template <class T, bool MIXED, bool BACKWARD>
constexpr bool kMixtureWork<CategoricalWork<T, MIXED, BACKWARD>> = true;

}  // namespace vaefast
