// The loops over a reconstruction, of a group of likelihoods: losses and gradients.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mixture_tile.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "likelihoods/term.h"
#include "weight.h"

namespace vaefast {
inline namespace VF_ISA {
// a unit's own: what it calls once is inlined, the body of a loop among it
namespace {

// Compiled once, for the loops that call it: all but the one that training takes.
template <class L, class V, int N>
__attribute__((noinline)) auto eval_apart(const V (&p)[N], V x, const Options& o) {
  return eval_term<L>(p, x, o);
}

template <class L, bool APART, class V, int N>
VF_HD auto term_of(const V (&p)[N], V x, const Options& o) {
  if constexpr (APART) {
    return eval_apart<L>(p, x, o);
  } else {
    return eval_term<L>(p, x, o);
  }
}

template <class T, class L, int N, bool NLL, bool GRAD>
double reconstruction_tile(const ReconstructionProblem& p, const Tile& t) {
  using V = LanesOf<L, T>;
  Buffer<T> param_buffer[N], target_buffer, weight_buffer, upstream_buffer, nll_buffer, grad_buffer[N];
  const T* param[N];
  for (int k = 0; k < N; ++k) param[k] = read(p.param[k], t, param_buffer[k]);
  const T* target = read(p.target, t, target_buffer);
  const T* weight = p.weight.data ? read(p.weight, t, weight_buffer) : nullptr;
  const T* upstream = p.upstream.data ? read(p.upstream, t, upstream_buffer) : nullptr;
  T* nll = writable(p.out_nll, t, nll_buffer);
  const bool each = p.out_nll.data != nullptr;
  T* grad[N];
  if constexpr (GRAD) {
    for (int k = 0; k < N; ++k) grad[k] = writable(p.out_grad[k], t, grad_buffer[k]);
  }
  const V factor = lit<V>(p.grad_scale);
  Accumulator<T, V> sum(t);
  for_vectors<T, V>(t.n, [&](int i) {
    V x[N];
    for (int k = 0; k < N; ++k) x[k] = at<T, V>(param[k], i);
    auto term = term_of < L, kFewLoops<T> || (kLarge<L> && !(NLL && GRAD)) > (x, at<T, V>(target, i), p.options);
    V scale = upstream ? factor * at<T, V>(upstream, i) : factor;
    if (weight) {
      const V w = at<T, V>(weight, i);
      term.nll = weighted(w, term.nll);
      for (int k = 0; k < N; ++k) term.grad[k] = weighted(w, term.grad[k]);
    }
    if constexpr (NLL) {
      sum.add(i, term.nll);
      if (each) put(nll, i, term.nll);
    }
    if constexpr (GRAD) {
      for (int k = 0; k < N; ++k) put(grad[k], i, term.grad[k] * scale);
    }
  });
  if constexpr (NLL) write_back(p.out_nll, t, nll_buffer);
  if constexpr (GRAD) {
    for (int k = 0; k < N; ++k) write_back(p.out_grad[k], t, grad_buffer[k]);
  }
  return sum.total();
}

template <class T, class L, int N>
void reconstruction_units(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  const auto body = [&](const Tile& t) {
    if constexpr (!kFewLoops<T>) {
      if (!p.grad) return reconstruction_tile<T, L, N, true, false>(p, t);
      if (!p.nll) return reconstruction_tile<T, L, N, false, true>(p, t);
    }
    return reconstruction_tile<T, L, N, true, true>(p, t);
  };
  for_units(p.space, p.sum.partial, kUnit, kTile, begin, end, body, kLanes<T>, repeats<L>(p));
}

template <class T, class L, int N>
void reconstruction_params(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  if (p.nparams == N) return reconstruction_units<T, L, N>(p, begin, end);
  if constexpr (N > L::required) reconstruction_params<T, L, N - 1>(p, begin, end);
}

}  // namespace

template <class T, class Group>
void run_reconstruction(int index, const ReconstructionProblem& p, int64_t begin, int64_t end) {
  visit(index, Group{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (kMixture<L>) {
      mixture_units<T, L>(p, begin, end);
    } else {
      reconstruction_params<T, L, L::params>(p, begin, end);
    }
  });
}

}  // namespace VF_ISA
}  // namespace vaefast
