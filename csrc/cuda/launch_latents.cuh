// Launches for draws, discrete latents, products of experts, aggregate posteriors and mixtures.
#pragma once

#include "cuda/categorical.cuh"
#include "cuda/experts.cuh"
#include "cuda/grid.cuh"
#include "cuda/launches.h"
#include "cuda/log_ratio.cuh"
#include "cuda/marginals.cuh"
#include "cuda/mixture_density.cuh"

#include <algorithm>

namespace vaefast {

template <class T>
void launch(const Alone<CategoricalProblem>& a, cudaStream_t stream) {
  visit(a.problem.uniform.wide != 0, [&](auto mixed) {
    visit(a.problem.backward, [&](auto backward) {
      using Work = CategoricalWork<T, decltype(mixed)::value, decltype(backward)::value>;
      start(alone_kernel<T, Work>, a.cut.blocks, kThreads, stream, a);
    });
  });
}

template <class T>
void launch(const Alone<LogRatioRows>& a, cudaStream_t stream) {
  visit(a.problem.prior, [&](auto prior) {
    start(alone_kernel<T, LogRatioWork<T, decltype(prior)::value>>, a.cut.blocks, kThreads, stream, a);
  });
}

template <class T>
void launch_backward(const LogRatioProblem& p, cudaStream_t stream) {
  const int64_t blocks = (p.samples * p.latents + kWarp - 1) / kWarp;
  visit(p.prior,
        [&](auto prior) { start(log_ratio_backward_kernel<T, decltype(prior)::value>, blocks, kThreads, stream, p); });
}

template <class T>
void launch(const ExpertsProblem& p, cudaStream_t stream) {
  visit(p.prior, [&](auto prior) {
    visit(p.there != nullptr, [&](auto masked) {
      start(experts_kernel<T, decltype(prior)::value, decltype(masked)::value>, (p.columns + kThreads - 1) / kThreads,
            kThreads, stream, p);
    });
  });
}

template <class T>
void launch(const MarginalsProblem& p, cudaStream_t stream) {
  const int64_t blocks = (p.batch + kThreads - 1) / kThreads * p.latents;
  p.backward ? start(marginals_backward_kernel<T>, blocks * (1 + p.chunks), kThreads, stream, p)
             : start(marginals_kernel<T>, blocks, kThreads, stream, p);
}

inline int64_t blocks_of(const MixtureLaunch& a) {
  const int64_t K = a.problem.components, D = a.problem.latents;
  const auto blocks = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  switch (a.step) {
    case MixtureStep::kWeights:
      return 1;
    case MixtureStep::kComponents:
      return blocks(K, kWarps);
    case MixtureStep::kSamples:
      return a.count;
    case MixtureStep::kSums:
      return K * std::max<int64_t>(1, blocks(D, kWarp));
    case MixtureStep::kCollect:
      return blocks(K * D, kThreads) + (a.problem.dlogits ? 1 : 0);
  }
  return 0;
}

template <class T>
void launch(const MixtureLaunch& a, cudaStream_t stream) {
  // one warp has the logits
  start(mixture_kernel<T>, blocks_of(a), a.step == MixtureStep::kWeights ? kWarp : kThreads, stream, a);
}

#define VF_LATENTS(T)                                                      \
  template void launch<T>(const Alone<CategoricalProblem>&, cudaStream_t); \
  template void launch<T>(const Alone<LogRatioRows>&, cudaStream_t);       \
  template void launch_backward<T>(const LogRatioProblem&, cudaStream_t);  \
  template void launch<T>(const ExpertsProblem&, cudaStream_t);            \
  template void launch<T>(const MarginalsProblem&, cudaStream_t);          \
  template void launch<T>(const MixtureLaunch&, cudaStream_t);

}  // namespace vaefast
