// Reconstructions by RealLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/real.h"

namespace vaefast {
template void launch_reconstruction<double, RealLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
