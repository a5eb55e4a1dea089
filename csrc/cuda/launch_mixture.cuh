// Launches of mixtures, each with a KL or its gradients, of which there may be none.
#pragma once

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods.h"

namespace vaefast {

template <class T>
void launch_classes(const Launch& a, cudaStream_t stream) {
  const DType dtype = a.reconstruction.param[0].dtype;
  if constexpr (sizeof(T) == 8) {
    if (dtype == DType::kDouble) return launch_with_kl<T, ClassWork<T, double>>(a, stream);
  }
  if (dtype == DType::kFloat) return launch_with_kl<T, ClassWork<T, float>>(a, stream);
  dtype == DType::kHalf ? launch_with_kl<T, ClassWork<T, __half>>(a, stream)
                        : launch_with_kl<T, ClassWork<T, __nv_bfloat16>>(a, stream);
}

template <class T>
void launch_mixture(const Launch& a, cudaStream_t stream) {
  visit(a.reconstruction.likelihood, Likelihoods{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (kMixture<L>) {
      visit(a.reconstruction.channels, typename L::Channels{}, [&](auto channels) {
        constexpr int C = decltype(channels)::value;
        if constexpr (kComponentParams<L, C> == 0) {
          launch_classes<T>(a, stream);
        } else {
          launch_with_kl<T, Mixture<T, L, C>>(a, stream);
        }
      });
    }
  });
}

}  // namespace vaefast
