// Reconstructions whose arithmetic is float (half precision too).

#include "cuda/launch_reconstruction.cuh"

namespace vaefast {
template void launch_reconstruction<float>(const Launch&, cudaStream_t);
}  // namespace vaefast
