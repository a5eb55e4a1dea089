// The plain path of operands in float32.

#include "cuda/launch_plain.cuh"

namespace vaefast {
template void launch_plain<float>(const Launch&, bool, cudaStream_t);
}  // namespace vaefast
