// The likelihood of mixtures, -log sum_k softmax(l)_k p_k(x), of one site: a vector of pixels, say, each with its own
// logits l and components. They lie in planes, as a network puts them out: K logits, then parameter after parameter of
// all K components (parameter j of component k is plane K (1 + j) + k).
//
// A mixture L has Channels, the numbers of channels a target may have (0: none, no dimension for them), params_of(C),
// how many parameters a component then has, and log_prob(), see below. Without parameters, component k is the class k.
#pragma once

#include <utility>
#include <vector>

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

template <int... Cs>
using Counts = std::integer_sequence<int, Cs...>;

template <int... Cs>
std::vector<int> channels_of(Counts<Cs...>) {
  return {Cs...};
}

// f(std::integral_constant<int, C>) for the C that channels is; it is one of them.
template <class F, int C, int... Cs>
VF_HD auto visit(int channels, Counts<C, Cs...>, const F& f) {
  if constexpr (sizeof...(Cs) > 0) {
    if (channels != C) return visit(channels, Counts<Cs...>{}, f);
  }
  return f(std::integral_constant<int, C>{});
}

template <class L, class = void>
constexpr bool kMixture = false;
template <class L>
constexpr bool kMixture<L, std::void_t<typename L::Channels>> = true;

// The parameters of a component, beside its logit.
template <class L, int C>
constexpr int kComponentParams = L::params_of(C);

// log sum of e^a, one a after the other, as e^most * sum
template <class V>
struct LogSumExp {
  V most = lit<V>(-3e38), sum = lit<V>(0);  // finite: -inf less -inf is no number

  VF_HD void add(V a) {
    const V e = exp_(lit<V>(0) - abs_(a - most)), one = lit<V>(1);
    const auto more = less(most, a);
    sum = select(more, fma_(sum, e, one), sum + e);
    most = select(more, a, most);
  }
};

// The site S gives, and takes, vectors V:
//   planes, components()      their numbers
//   param(plane), target(c)   what it reads
//   grads()                   whether gradients are wanted, which go to
//   grad(plane, g)
//   keeps()                   whether numbers can be left there before, by
//   keep(plane, x)            and read by
//   kept(plane)
// The nll is log S - log J with S = sum_k e^(l_k - M), J = sum_k e^(l_k - M) p_k(x), M the largest logit: both
// logarithms, of numbers near 1, are small beside a large nll.
//
// L::log_prob<C>(site, k, options, emit) returns log p_k(x) less a number L::offset<C>(options), which leaves it small
// and so more exact, and calls emit(j, its derivative in parameter j).
template <class L, int C, class S, class V = typename S::V>
VF_HD V mixture_nll(const S& site, int K, const Options& o) {
  const V zero = lit<V>(0);
  V most = lit<V>(-3e38), sum = zero;
  VF_ROLLED
  for (int k = 0; k < K; ++k) {
    const V l = site.param(k);
    most = select(less(most, l), l, most);
  }
  if constexpr (kComponentParams<L, C> == 0) {
    const V x = site.target(0);
    V picked = lit<V>(__builtin_nan(""));  // what it stays where there is no such class
    VF_ROLLED
    for (int k = 0; k < K; ++k) {
      const V l = site.param(k) - most;
      sum = sum + exp_(l);
      picked = select(equal(x, V(typename Lane<V>::type(k))), l, picked);
    }
    if (site.grads()) {
      const V inverse = lit<V>(1) / sum, none = select(equal(picked, picked), zero, picked);
      VF_ROLLED
      for (int k = 0; k < K; ++k) {
        const V hit = select(equal(x, V(typename Lane<V>::type(k))), lit<V>(1), none);
        site.grad(k, fma_(exp_(site.param(k) - most), inverse, zero - hit));
      }
    }
    return log_(sum) - picked;
  } else {
    LogSumExp<V> joint;
    VF_ROLLED
    for (int k = 0; k < K; ++k) {
      const V l = site.param(k) - most;
      sum = sum + exp_(l);
      const V log_joint = l + L::template log_prob<C>(site, k, o, [&](int j, V d) {
                            if (site.keeps()) site.keep(K * (1 + j) + k, d);
                          });
      if (site.keeps()) site.keep(k, log_joint);
      joint.add(log_joint);
    }
    if (site.grads()) {
      const V inverse = lit<V>(1) / sum, minus = lit<V>(-1) / joint.sum;
      VF_ROLLED
      for (int k = 0; k < K; ++k) {
        const V prior = exp_(site.param(k) - most) * inverse;
        // minus the component's share of J
        const auto share = [&](V log_joint) { return exp_(log_joint - joint.most) * minus; };
        if (site.keeps()) {
          const V w = share(site.kept(k));
          VF_ROLLED
          for (int j = 0; j < kComponentParams<L, C>; ++j) {
            const int plane = K * (1 + j) + k;
            site.grad(plane, w * site.kept(plane));
          }
          site.grad(k, prior + w);
        } else {
          // again: a share is known only now
          const V log_joint = site.param(k) - most + L::template log_prob<C>(site, k, o, [](int, V) {});
          const V w = share(log_joint);
          L::template log_prob<C>(site, k, o, [&](int j, V d) { site.grad(K * (1 + j) + k, w * d); });
          site.grad(k, prior + w);
        }
      }
    }
    return log_(sum) - (joint.most + log_(joint.sum)) - L::template offset<C, V>(o);
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
