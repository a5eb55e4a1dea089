// Reconstructions whose arithmetic is double.

#include "cuda/launch_reconstruction.cuh"

namespace vaefast {
template void launch_reconstruction<double>(const Launch&, cudaStream_t);
}  // namespace vaefast
