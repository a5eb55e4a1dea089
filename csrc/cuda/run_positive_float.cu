// Reconstructions by PositiveLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/positive.h"

namespace vaefast {
template void launch_reconstruction<float, PositiveLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
