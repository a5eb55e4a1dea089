// Kernels whose arithmetic is double.

#include "cuda/run.cuh"

namespace vaefast {
VF_TYPED(, double)
}  // namespace vaefast
