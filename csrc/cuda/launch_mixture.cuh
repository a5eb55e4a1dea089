// Launches of mixtures, each with a KL or its gradients, of which there may be none.
#pragma once

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods.h"

namespace vaefast {

template <class T>
void launch_mixture(const Launch& a, cudaStream_t stream) {
  visit(a.reconstruction.likelihood, Likelihoods{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (kMixture<L>) {
      visit(a.reconstruction.channels, typename L::Channels{},
            [&](auto channels) { launch_with_kl<T, Mixture<T, L, decltype(channels)::value>>(a, stream); });
    }
  });
}

}  // namespace vaefast
