// Reconstructions by BinaryLikelihoods whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"
#include "likelihoods/binary.h"

namespace vaefast {
template void launch_reconstruction<double, BinaryLikelihoods>(int, const Launch&, cudaStream_t);
}  // namespace vaefast
