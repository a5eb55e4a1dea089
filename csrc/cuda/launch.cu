// The CUDA back end: the caller's device and stream, the generator's state, the counters that launches share.

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "cuda/run.cuh"
#include "device.h"

namespace vaefast {

// One a stream serves eagerly, for launches on a stream follow each other; a graph gets its own, cleared in the graph,
// for its replays may run beside anything.
at::Tensor counter_for(const at::Tensor& on, cudaStream_t stream) {
  const auto options = on.options().dtype(at::kInt);
  cudaStreamCaptureStatus status;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  if (status != cudaStreamCaptureStatusNone) return at::zeros({1}, options);
  static std::mutex mutex;
  static auto* counters = new std::map<std::pair<int, cudaStream_t>, at::Tensor>();
  std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counter = (*counters)[{on.get_device(), stream}];
  if (!counter.defined()) counter = at::zeros({1}, options);
  return counter;
}

namespace {

void run(const at::Tensor& on, Job& job) {
  const c10::cuda::CUDAGuard guard(on.device());
  run_on(on, job, c10::cuda::getCurrentCUDAStream().stream());
}

void philox(const c10::optional<at::Generator>& generator, int64_t numel, const at::Tensor& save, Philox& philox) {
  auto* cuda = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(save.get_device()));
  const c10::cuda::CUDAGuard guard(save.device());  // capture is asked of the current device's stream
  at::PhiloxCudaState state;
  {
    std::lock_guard<std::mutex> lock(cuda->mutex_);
    state = cuda->philox_cuda_state((uint64_t(numel) + 3) / 4 * 4);
  }
  if (state.captured_) {
    philox.seed = state.seed_.ptr;
    philox.offset = state.offset_.ptr;
    philox.offset_add = state.offset_intragraph_;
  } else {
    philox.seed_value = state.seed_.val;
    philox.offset_value = state.offset_.val;
  }
  philox.offset_shift = 2;  // torch counts words, Philox counters hold four
  philox.save = save.mutable_data_ptr<int64_t>();
}

const bool registered = [] {
  device_for(c10::DeviceType::CUDA) = {run, philox};
  return true;
}();

}  // namespace

}  // namespace vaefast
