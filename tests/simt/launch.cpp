// The executor as the device of CPU tensors: the package built with this in place of cpu/launch.cpp and cuda/launch.cu
// runs every call through csrc/cuda's device code.

#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "simt.h"
// after simt.h, which stands in for nvcc
#include "cuda/run_latents.cuh"
#include "device.h"

namespace vaefast {

// One for all launches, which must each leave it at 0.
unsigned* counter_for(const at::Tensor&, cudaStream_t) {
  static unsigned counter = 0;
  TORCH_CHECK(counter == 0, "a launch left its counter at ", counter);
  return &counter;
}

namespace {

std::mutex one_launch_at_a_time;

template <class Problem>
void run(const at::Tensor& on, Problem& problem) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  run_on(on, problem, nullptr);
}

// As cuda/launch.cu does outside graph capture: values by launch argument, written by the kernel for backward.
void philox(const c10::optional<at::Generator>& generator, int64_t, const at::Tensor& save, Philox& philox) {
  auto* cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  std::lock_guard<std::mutex> lock(cpu->mutex_);
  philox.seed_value = cpu->random64() ^ (uint64_t(1) << 63);
  philox.offset_shift = 2;
  philox.save = save.mutable_data_ptr<int64_t>();
}

const bool registered = [] {
  device_for(c10::DeviceType::CPU) = {run<Job>,
                                      philox,
                                      false,
                                      false,
                                      nullptr,
                                      run<const MarginalsProblem>,
                                      run<const CategoricalProblem>,
                                      run<const LogRatioProblem>,
                                      run<const ExpertsProblem>,
                                      run<const MixtureProblem>};
  return true;
}();

}  // namespace

}  // namespace vaefast
