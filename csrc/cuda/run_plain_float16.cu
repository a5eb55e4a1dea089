// The plain path of operands in float16.

#include "cuda/launch_plain.cuh"

namespace vaefast {
template void launch_plain<__half>(const Launch&, bool, cudaStream_t);
}  // namespace vaefast
