// Launches of reconstructions, each with a KL or its gradients, of which there may be none.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/launches.h"

namespace vaefast {

template <class T, class Rec, class Post>
void launch(const Launch& a, cudaStream_t stream) {
  start(job_kernel<T, Rec, Post>, a.rec.blocks + a.post.blocks, kThreads, stream, a);
}

template <class T, class Rec>
void launch_with_kl(const Launch& a, cudaStream_t stream) {
  a.posterior.backward ? launch<T, Rec, PosteriorBackward<T, false, true>>(a, stream)
                       : launch<T, Rec, PosteriorForward<T, false, true>>(a, stream);
}

template <class T, class L, int NP>
void launch_params(const Launch& a, cudaStream_t stream) {
  if (a.reconstruction.nparams == NP) return launch_with_kl<T, Reconstruction<T, L, NP>>(a, stream);
  if constexpr (NP > L::required) launch_params<T, L, NP - 1>(a, stream);
}

template <class T>
void launch_rescale(const Launch& a, cudaStream_t stream) {
  launch<T, Rescale<T>, PosteriorBackward<T, false, true>>(a, stream);
}

template <class T, class Group>
void launch_reconstruction(int index, const Launch& a, cudaStream_t stream) {
  visit(index, Group{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (!kMixture<L>) launch_params<T, L, L::params>(a, stream);
  });
}

}  // namespace vaefast
