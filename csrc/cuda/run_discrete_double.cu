// Reconstructions by DiscreteLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/discrete.h"

namespace vaefast {
template void launch_reconstruction<double, DiscreteLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
