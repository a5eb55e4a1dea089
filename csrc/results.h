// Results in the making: their dtypes, their memory, and the way to the device that fills them.
#pragma once

#include "compute.h"
#include "device.h"

namespace vaefast {

bool is_double(const Tensor& t);
bool is_double(const MaybeTensor& t);
bool is_wide(const PosteriorInputs& in);

at::ScalarType promote(at::ScalarType dtype, const Tensor& t);
at::ScalarType promote(at::ScalarType dtype, const MaybeTensor& t);

// at::empty and at::empty_like without an operator's cost where it can be done without
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);
Tensor fresh_like(const Tensor& t, at::ScalarType dtype);
Tensor fresh_like(const Tensor& t);

// [B], or 0-d
Tensor empty_sum(const Tensor& like, Reduction r, bool wide);

// A gradient in the making: the parameter's own where shapes agree; else full size in the arithmetic type, then summed.
Tensor empty_grad(const Tensor& param, const Tensor& lead, bool wide);
Tensor finish_grad(Tensor grad, const Tensor& param);

bool no_compute(const Tensor& t);
void run(const Tensor& on, Job& job);

}  // namespace vaefast
