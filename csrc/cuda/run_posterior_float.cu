// Posteriors whose arithmetic is float (half precision too).

#include "cuda/launch_posterior.cuh"

namespace vaefast {
VF_POSTERIOR(float)
}  // namespace vaefast
