// The CUDA back end: the caller's device and stream, the generator's state, the counters that launches share.

#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

#include "cuda/run_latents.cuh"
#include "device.h"

namespace vaefast {

namespace {

uint64_t capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

// Zeros on the current device, for good. Not torch's allocator's: that takes them from the pool of a graph in the
// making, whose memory ends with the graph. Nor on a stream of torch's, which may be in capture.
unsigned* zeros(size_t count) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  cudaStream_t stream;
  void* memory;
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const size_t bytes = count * sizeof(unsigned);
  cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    // torch may hold what there is without using it
    (void)cudaGetLastError();
    c10::cuda::CUDACachingAllocator::emptyCache();
    status = cudaMalloc(&memory, bytes);
  }
  C10_CUDA_CHECK(status);
  C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  return static_cast<unsigned*>(memory);
}

}  // namespace

// One a stream serves eagerly, for launches on a stream follow each other. A captured launch gets one of its own: the
// graph's replays follow each other, but may run beside anything else. All are 0 from the start, so a graph holds no
// node that clears them.
unsigned* counter_for(const at::Tensor& on, cudaStream_t stream) {
  constexpr size_t kTogether = 4096;
  struct Counters {
    unsigned *next = nullptr, *end = nullptr;
    std::map<cudaStream_t, unsigned*> of_stream;

    unsigned* take() {
      if (next == end) {
        next = zeros(kTogether);
        end = next + kTogether;
      }
      return next++;
    }
  };
  static std::mutex mutex;
  static auto* devices = new std::map<int, Counters>();
  std::lock_guard<std::mutex> lock(mutex);
  Counters& counters = (*devices)[on.get_device()];
  if (capture_of(stream)) return counters.take();
  unsigned*& counter = counters.of_stream[stream];
  if (!counter) counter = counters.take();
  return counter;
}

namespace {

void run_on_cuda(const at::Tensor& on, Job& job) {
  const c10::cuda::CUDAGuard guard(on.device());
  run_on(on, job, c10::cuda::getCurrentCUDAStream().stream());
}

template <class Problem>
void run_alone_on_cuda(const at::Tensor& on, const Problem& p) {
  const c10::cuda::CUDAGuard guard(on.device());
  run_on(on, p, c10::cuda::getCurrentCUDAStream().stream());
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

// Tensors may say cuda where there is none, while a graph is traced.
uint64_t capture(c10::Device device) {
  return c10::cuda::device_count() ? capture_of(c10::cuda::getCurrentCUDAStream(device.index()).stream()) : 0;
}

const bool registered = [] {
  device_for(c10::DeviceType::CUDA) = {run_on_cuda,
                                       philox,
                                       false,
                                       false,
                                       capture,
                                       run_alone_on_cuda<MarginalsProblem>,
                                       run_alone_on_cuda<CategoricalProblem>,
                                       run_alone_on_cuda<LogRatioProblem>,
                                       run_alone_on_cuda<ExpertsProblem>,
                                       run_alone_on_cuda<MixtureProblem>};
  return true;
}();

}  // namespace

}  // namespace vaefast
