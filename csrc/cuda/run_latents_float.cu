// Draws, discrete latents, products of experts and aggregate posteriors, whose arithmetic is float (half precision
// too).

#include "cuda/launch_latents.cuh"

namespace vaefast {
VF_LATENTS(float)
}  // namespace vaefast
