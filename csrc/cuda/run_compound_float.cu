// Reconstructions by CompoundLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/compound.h"

namespace vaefast {
template void launch_reconstruction<float, CompoundLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
