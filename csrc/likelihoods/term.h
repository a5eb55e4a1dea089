// What a likelihood is: a struct whose eval(p, x) gives the nll of x in nats and its gradient in each given parameter;
// p holds the first `required` to `params` of them, in the order of the entry in vaefast/likelihoods.py. One that has
// options, `options` numbers in that entry's order, takes them third: eval(p, x, o).
// One that is many instructions says so by `large`, very many by `single`.
// Those with Channels are mixtures (mixture.h), whose last option is the dimension along which their planes lie; the
// one before it, if a target has any, the number of channels.
#pragma once

#include "problems.h"
#include "registry.h"

namespace vaefast {
inline namespace VF_ISA {

template <class V, int N>
struct Term {
  V nll;
  V grad[N];
};

template <class L, class = void>
constexpr int kOptions = 0;
template <class L>
constexpr int kOptions<L, std::void_t<decltype(L::options)>> = L::options;

// Whether one is so large that a CPU's rarer loops call it: `large` in its struct. And whether one vector has enough to
// do, where two would not fit its registers and take the compiler three times as long: `single`.
template <class L, class = void>
constexpr bool kLarge = false;
template <class L>
constexpr bool kLarge<L, std::void_t<decltype(L::large)>> = L::large;
template <class L, class = void>
constexpr bool kSingle = false;
template <class L>
constexpr bool kSingle<L, std::void_t<decltype(L::single)>> = L::single;

template <class L, class V, int N>
VF_HD auto eval_term(const V (&p)[N], V x, const Options& o) {
  if constexpr (kOptions<L> > 0) {
    return L::eval(p, x, o);
  } else {
    return L::eval(p, x);
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
