// Kernels whose arithmetic is float (half precision too).

#include "cuda/run.cuh"

namespace vaefast {
VF_TYPED(, float)
}  // namespace vaefast
