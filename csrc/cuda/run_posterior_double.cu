// Posteriors whose arithmetic is double.

#include "cuda/launch_posterior.cuh"

namespace vaefast {
VF_POSTERIOR(double)
}  // namespace vaefast
