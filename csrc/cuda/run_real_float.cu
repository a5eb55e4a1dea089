// Reconstructions by RealLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/real.h"

namespace vaefast {
template void launch_reconstruction<float, RealLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
