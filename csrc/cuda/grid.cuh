// How a kernel is started on a GPU. The tests' executor puts its own file of this name before it.
#pragma once

#include <c10/cuda/CUDAException.h>

namespace vaefast {

template <class... Args>
void start(void (*kernel)(Args...), int64_t blocks, int threads, cudaStream_t stream, const Args&... args) {
  TORCH_CHECK(blocks <= 0x7fffffff, "vaefast: too many elements for one launch");
  kernel<<<unsigned(blocks), unsigned(threads), 0, stream>>>(args...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace vaefast
