// Reconstructions by CountLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/counts.h"

namespace vaefast {
template void launch_reconstruction<float, CountLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
