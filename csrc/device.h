// What a device provides: cpu/launch.cpp and cuda/launch.cu each register one of these.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "problems.h"

namespace vaefast {

struct Device {
  void (*run)(const at::Tensor& on, Job& job) = nullptr;
  // Fills in where the noise of a sample of numel elements comes from; `save` [2] gets seed and counter for backward.
  void (*philox)(const c10::optional<at::Generator>& generator, int64_t numel, const at::Tensor& save,
                 Philox& philox) = nullptr;
  bool both = false;         // computes a KL and its gradients in one job
  bool synchronous = false;  // has done its work when run returns, so that what it wrote can be read
  // The graph that launches are being captured into, 0 for none; null where there is no such thing.
  uint64_t (*capture)(c10::Device device) = nullptr;
  // Null where PyTorch computes them.
  void (*marginals)(const at::Tensor& on, const MarginalsProblem&) = nullptr;
  void (*categorical)(const at::Tensor& on, const CategoricalProblem&) = nullptr;
  void (*log_ratio)(const at::Tensor& on, const LogRatioProblem&) = nullptr;
  void (*experts)(const at::Tensor& on, const ExpertsProblem&) = nullptr;
  void (*mixture)(const at::Tensor& on, const MixtureProblem&) = nullptr;
  void (*bound)(const BoundProblem&) = nullptr;
  void (*ivon)(const IvonProblem*, int64_t count) = nullptr;
};

Device& device_for(c10::DeviceType type);

}  // namespace vaefast
