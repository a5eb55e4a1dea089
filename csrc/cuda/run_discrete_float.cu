// Reconstructions by DiscreteLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/discrete.h"

namespace vaefast {
template void launch_reconstruction<float, DiscreteLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
