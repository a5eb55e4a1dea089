// Reconstructions by CountLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/counts.h"

namespace vaefast {
template void launch_reconstruction<double, CountLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
