// The operators under the vmap by which the autograd engine batches gradients (is_grads_batched, vectorize=True).
#pragma once

#include <ATen/core/boxing/KernelFunction.h>

namespace vaefast {

// Calls the operator once for each of the batch, and puts the results side by side.
void one_by_one(const c10::OperatorHandle& op, torch::jit::Stack* stack);

}  // namespace vaefast
