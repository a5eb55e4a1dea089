// What the nodes with a reconstruction have in common.
#pragma once

#include "autograd/archive.h"
#include "autograd/node.h"
#include "operators/operators.h"

namespace vaefast {

// PyTorch differentiates these; the kernels do not.
void check_no_grad(const ReconstructionInputs& in);

// The mask of the gradients that forward should write.
Mask kept_mask(const ReconstructionInputs& in, const Reduced& reduced, const Mask& wanted);

struct SavedReconstruction {
  ReconstructionInputs in;
  Reduced reduced;
  bool in_place;
  Mask wanted;   // at forward
  Tensors kept;  // one for each wanted, or none
  bool overwritten;
  int64_t capture;

  // `over` are the parameters that `kept` was written over.
  static void put(Archive& archive, ReconstructionInputs in, const Reduced& reduced, Overwrite overwrite,
                  const Mask& wanted, Tensors kept, const Mask& over);
  explicit SavedReconstruction(Archived& saved);

  // No replay of a CUDA graph reads the kept gradients after the first, if the same graph makes them anew each time.
  bool final(const variable_list& upstream) const {
    return in_place && is_last_use(upstream) && capture == capture_of(in.target);
  }

  Tensors backward(const Tensor& upstream, const Mask& mask) const;
};

}  // namespace vaefast
