// Outputs: their dtypes, their memory, and the way to the device that fills them.
#pragma once

#include "arguments.h"
#include "device.h"

namespace vaefast {

bool is_double(const Tensor& t);
bool is_double(const MaybeTensor& t);

at::ScalarType promote(at::ScalarType dtype, const Tensor& t);
at::ScalarType promote(at::ScalarType dtype, const MaybeTensor& t);

// at::empty and at::empty_like without an operator's cost where it can be done without
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);
Tensor fresh_like(const Tensor& t, at::ScalarType dtype);
Tensor fresh_like(const Tensor& t);

bool is_reduced(const Reduced& r);

// The dimensions that are left, of those that come first: each of their elements is a sum.
int64_t batch_dims_of(const Reduced& r);

// What a sum over `shape` is multiplied by to be the reduction.
double scale_of(const Reduced& r, at::IntArrayRef shape);

// [B], [K, B] or 0-d
Tensor empty_sum(const Tensor& like, const Reduced& r, bool wide);

// A gradient in the making: the parameter's own where shapes agree; else full size in the arithmetic type, then summed.
Tensor empty_grad(const Tensor& param, const Tensor& lead, bool wide);
Tensor finish_grad(Tensor grad, const Tensor& param);

bool no_compute(const Tensor& t);
void run(const Tensor& on, Job& job);

// By a device's kernel of what is no job; raises where it has none of `what`.
template <class Problem>
void run(const Tensor& on, const Problem& problem, void (*Device::*kernel)(const Tensor&, const Problem&),
         const char* what) {
  const auto on_device = device_for(on.device().type()).*kernel;
  TORCH_CHECK_VALUE(on_device, "vaefast: there is no kernel for ", what, " of ", on.device(), " tensors");
  on_device(on, problem);
}

}  // namespace vaefast
