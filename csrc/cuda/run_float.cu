// Kernels whose arithmetic is float (half precision too).

#include "cuda/run.cuh"

namespace vaefast {
template void run_typed<float>(const at::Tensor&, const Job&, cudaStream_t);
}  // namespace vaefast
