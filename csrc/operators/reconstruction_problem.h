// A reconstruction's operator in the making: its outputs, its gradients, and the problems that a device solves for
// them.
#pragma once

#include "arguments.h"

namespace vaefast {

void check_counts(const ReconstructionInputs& in);
bool is_wide(const ReconstructionInputs& in);
bool no_compute(const ReconstructionInputs& in);

struct ReconstructionOutputs {
  Tensor nll;
  Tensors grads;

  // Those that the mask wants.
  Tensors finish(const ReconstructionInputs& in, const Mask& mask) const;
};

// Gradients that `over` names are their parameters themselves.
ReconstructionOutputs empty_grads(const ReconstructionInputs& in, const Mask& mask, const Mask& over = {});
ReconstructionOutputs empty_outputs(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask,
                                    const Mask& over);

ReconstructionProblem forward_problem(const ReconstructionInputs& in, const Reduced& reduced,
                                      const ReconstructionOutputs& out, const Mask& mask);
ReconstructionProblem backward_problem(const Tensor& upstream, const ReconstructionInputs& in, const Reduced& reduced,
                                       const ReconstructionOutputs& out, const Mask& mask);

// kept *= upstream, for as many as one problem takes of those that share the largest one's shape; the others,
// parameters that were broadcast or a long list's, are multiplied here and now.
// The first batch_dims dimensions are its rows.
ReconstructionProblem rescale_problem(const Tensors& kept, const Tensor& upstream, int64_t batch_dims = 0);

}  // namespace vaefast
