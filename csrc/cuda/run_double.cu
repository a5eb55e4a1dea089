// Kernels whose arithmetic is double.

#include "cuda/run.cuh"

namespace vaefast {
template void run_typed<double>(const at::Tensor&, const Job&, cudaStream_t);
}  // namespace vaefast
