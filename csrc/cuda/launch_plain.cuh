// Launches on the plain path.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/launches.h"
#include "cuda/plain.cuh"
#include "likelihoods.h"

namespace vaefast {

template <class Rec, class Post>
void launch_plain(const Launch& a, cudaStream_t stream) {
  start(job_kernel<float, Rec, Post>, a.rec.blocks + a.post.blocks, kThreads, stream, a);
}

template <class S, class L, int NP>
void launch_plain_params(const Launch& a, cudaStream_t stream) {
  if constexpr (NP > L::required) {
    if (a.reconstruction.nparams < NP) return launch_plain_params<S, L, NP - 1>(a, stream);
  }
  using Rec = PlainReconstruction<S, L, NP>;
  if constexpr (std::is_same_v<S, __half>) {
    // see is_plain()
    if (a.posterior.backward) return launch_plain<Rec, PlainBackward<S, false, true>>(a, stream);
  }
  launch_plain<Rec, PlainForward<S, false, true>>(a, stream);
}

template <class S, template <class, bool, bool> class Work>
void launch_plain_posterior(const Launch& a, cudaStream_t stream) {
  if (!a.posterior.kl) return launch_plain<Nothing, Work<S, true, false>>(a, stream);
  a.posterior.sample ? launch_plain<Nothing, Work<S, true, true>>(a, stream)
                     : launch_plain<Nothing, Work<S, false, true>>(a, stream);
}

template <class S>
void launch_plain(const Launch& a, bool reconstruction, cudaStream_t stream) {
  if (!reconstruction) {
    return a.posterior.backward ? launch_plain_posterior<S, PlainBackward>(a, stream)
                                : launch_plain_posterior<S, PlainForward>(a, stream);
  }
  if (a.reconstruction.kept) return launch_plain<PlainRescale<S>, PlainBackward<S, false, true>>(a, stream);
  visit(a.reconstruction.likelihood, Likelihoods{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (!kMixture<L>) launch_plain_params<S, L, L::params>(a, stream);
  });
}

}  // namespace vaefast
