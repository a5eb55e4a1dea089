// Reconstructions by PositiveLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/positive.h"

namespace vaefast {
template void launch_reconstruction<double, PositiveLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
