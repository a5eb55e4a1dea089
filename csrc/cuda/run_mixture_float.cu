// Mixtures whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"

namespace vaefast {
template void launch_mixture<float>(const Launch&, cudaStream_t);
}  // namespace vaefast
