// Mixtures, and gradients that were kept, whose arithmetic is float (half precision too).

#include "cuda/launch_mixture.cuh"

namespace vaefast {
template void launch_rescale<float>(const Launch&, cudaStream_t);
template void launch_mixture<float>(const Launch&, cudaStream_t);
}  // namespace vaefast
