// Where a reconstruction's gradients may be written over its parameters.
#pragma once

#include "arguments.h"

namespace vaefast {

// Of the gradients that forward keeps, those that can stand in their parameter's own memory: it belongs to a result of
// the graph, has the gradient's shape, and neither the likelihood nor anything else that the call is given reads it
// afterwards. `others` are given besides `in`.
Mask overwritable(const ReconstructionInputs& in, const Mask& kept, std::initializer_list<MaybeTensor> others);

}  // namespace vaefast
