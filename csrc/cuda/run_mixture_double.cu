// Mixtures, and gradients that were kept, whose arithmetic is double.

#include "cuda/launch_mixture.cuh"

namespace vaefast {
template void launch_rescale<double>(const Launch&, cudaStream_t);
template void launch_mixture<double>(const Launch&, cudaStream_t);
}  // namespace vaefast
