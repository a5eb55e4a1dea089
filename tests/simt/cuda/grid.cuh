// How a kernel is started on the executor: in place of csrc/cuda/grid.cuh.
#pragma once

namespace vaefast {

template <class... Args>
void start(void (*kernel)(Args...), int64_t blocks, int threads, cudaStream_t, const Args&... args) {
  simt::run(reinterpret_cast<const void*>(kernel), blocks, threads, [&] { kernel(args...); });
}

}  // namespace vaefast
