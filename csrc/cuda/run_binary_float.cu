// Reconstructions by BinaryLikelihoods whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/binary.h"

namespace vaefast {
template void launch_reconstruction<float, BinaryLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
