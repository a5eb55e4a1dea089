// Draws, discrete latents, products of experts and aggregate posteriors, whose arithmetic is double.

#include "cuda/launch_latents.cuh"

namespace vaefast {
VF_LATENTS(double)
}  // namespace vaefast
