// The plain path of operands in bfloat16.

#include "cuda/launch_plain.cuh"

namespace vaefast {
template void launch_plain<__nv_bfloat16>(const Launch&, bool, cudaStream_t);
}  // namespace vaefast
