// Reconstructions by CompoundLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/compound.h"

namespace vaefast {
template void launch_reconstruction<double, CompoundLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
