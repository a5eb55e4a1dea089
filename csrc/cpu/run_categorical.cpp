// Categorical latents, some sites after the others.

#include <cstring>

#include "categorical.h"
#include "cpu/classes.h"
#include "cpu/runs.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// Which class, and the 1 that is put there, or NaN.
template <class T>
struct Drawn {
  int64_t place = 0;
  T value = 1;
};

// By the inverse of the distribution function: the first class up to which there is more than a uniform number of
// [0, 1) times the whole, so that none of probability 0 is drawn.
template <class T, bool MIXED>
void draw(Sites<SiteALane<T>, MIXED>& sites, const CategoricalProblem& p, const double* uniforms, Drawn<T>* drawn) {
  constexpr int n = SiteALane<T>::kAtOnce;
  T weights[n];
  double whole[n] = {}, sum[n] = {}, at[n], place[n] = {};
  sites.pass([&](int i) {
    store_lanes(sites.weight(i), weights);
    for (int l = 0; l < n; ++l) whole[l] += double(weights[l]);
  });
  for (int l = 0; l < n; ++l) at[l] = whole[l] * (uniforms[l] * kBelowOne);
  sites.pass([&](int i) {
    store_lanes(sites.weight(i), weights);
    for (int l = 0; l < n; ++l) {
      sum[l] += double(weights[l]);
      place[l] += sum[l] <= at[l] ? 1.0 : 0.0;
    }
  });
  for (int l = 0; l < n; ++l) {
    const int64_t k = int64_t(place[l]);
    drawn[l] = {k < p.classes ? k : p.classes - 1, T(whole[l] - whole[l] + 1)};
  }
}

template <class T, bool MIXED>
void draw(Sites<SiteAtATime<T>, MIXED>& sites, const CategoricalProblem& p, const double* uniforms, Drawn<T>* drawn) {
  constexpr int n = SiteAtATime<T>::kLanes;
  T weights[n];
  double whole = 0, sum = 0;
  int64_t first = 0, place = 0;
  const auto read_weights = [&](int i) {
    store_lanes(sites.weight(i), weights);
    for (int l = 0; l < n; ++l) weights[l] = first + l < p.classes ? weights[l] : T(0);
  };
  sites.pass([&](int i) {
    read_weights(i);
    whole += sum_of_lanes<T>(load_lanes<Wide<T>>(weights));
    first += n;
  });
  const double at = whole * (uniforms[0] * kBelowOne);
  bool found = false;
  first = 0;
  sites.pass([&](int i) {
    if (found) return;
    read_weights(i);
    const double more = sum_of_lanes<T>(load_lanes<Wide<T>>(weights));
    found = sum + more > at;
    for (int l = 0; found && l < n && !(sum > at); ++l) {
      sum += double(weights[l]);
      // added up in another order, they may not come to it
      if (weights[l] > 0) place = first + l;
    }
    if (!found) sum += more;
    first += n;
  });
  *drawn = {place, T(whole - whole + 1)};
}

// One-hot vectors.
template <class T, class S>
void write_drawn(const PlaneOperand& o, const Tile& t, const Drawn<T>* drawn) {
  S* data = static_cast<S*>(o.op.data);
  const int64_t inner = o.op.stride[t.space.ndim - 1];
  for_runs(t, o.op.stride, [&](int at, int n, int64_t offset) {
    if (o.step == 1 && (n == 1 || inner == o.count)) {
      std::memset(data + offset, 0, sizeof(S) * size_t(n) * size_t(o.count));
    } else {
      for_planes(o, inner, 0, n, offset, 1, [&](int64_t to, int64_t step, int count, int64_t, int64_t) {
        for (int k = 0; k < count; ++k) data[to + k * step] = Store<S>::from(T(0));
      });
    }
    for (int i = 0; i < n; ++i) {
      const auto& [place, value] = drawn[at + i];
      data[offset + i * inner + place * o.step] = Store<S>::from(value);
    }
  });
}

template <class T, class L, bool MIXED>
void forward(const CategoricalProblem& p, const Tile& t) {
  const L lay{t};
  Sites<L, MIXED> sites(p, lay);
  sites.sum_up();
  if (p.out_z.data) {
    double uniforms[L::kAtOnce] = {};
    Drawn<T> drawn[L::kAtOnce];
    read_sites(p.uniforms, t, uniforms);
    draw(sites, p, uniforms, drawn);
    visit(p.out_z.dtype, [&](auto tag) {
      write_drawn<T, typename decltype(tag)::type>({p.out_z, p.out_z_step, int(p.classes)}, t, drawn);
    });
  }
  if (!p.kl) return;
  T kl[lanes<Wide<T>>()];
  store_lanes(sites.kl(), kl);
  write_sites(p.out_kl, t, kl);
}

template <class T, class L, bool MIXED>
void backward(const CategoricalProblem& p, const Tile& t) {
  using V = Wide<T>;
  const L lay{t};
  Sites<L, MIXED> sites(p, lay);
  sites.sum_up();
  T dkl[lanes<V>()] = {};
  if (p.kl) read_sites(p.dkl, t, dkl);
  const V g = L::kAtOnce == 1 ? V(dkl[0]) : load_lanes<V>(dkl);
  sites.differentiate(g * lit<V>(p.dkl_scale), g * lit<V>(p.dkl_prior_scale));
}

template <class T, class L, bool MIXED>
void run(const CategoricalProblem& p, int64_t begin, int64_t end) {
  for (int64_t site = begin; site < end; site += L::kAtOnce) {
    const Tile t{p.space, site, int(end - site < L::kAtOnce ? end - site : L::kAtOnce)};
    p.backward ? backward<T, L, MIXED>(p, t) : forward<T, L, MIXED>(p, t);
  }
}

template <class T, class L>
void run(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.uniform.wide != 0 ? run<T, L, true>(p, begin, end) : run<T, L, false>(p, begin, end);
}

}  // namespace

template <class T>
void run_categorical(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.classes* SiteALane<T>::kAtOnce <= kBlock ? run<T, SiteALane<T>>(p, begin, end)
                                             : run<T, SiteAtATime<T>>(p, begin, end);
}

template void run_categorical<float>(const CategoricalProblem&, int64_t, int64_t);
template void run_categorical<double>(const CategoricalProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
