// From tensors to problems: dtypes, the iteration space, operands with coalesced strides.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include "problems.h"

namespace vaefast {

DType dtype_of(const at::Tensor& t);
// Collects the operands of a problem over `shape`, then fills in its space and their strides.
class Layout {
 public:
  // `lead` gives the memory order; its first `batch_dims` dimensions stay outermost so that a row is one sum.
  Layout(const at::Tensor& lead, int64_t batch_dims);

  // Views t as broadcast to the shape; raises if it does not broadcast or lies elsewhere.
  void add(Operand& operand, const at::Tensor& t);
  // t has the shape's leading dimensions, or none: a gradient as it comes down to a reduced loss.
  void add_rows(Operand& operand, const at::Tensor& t);
  void add_weight(Operand& operand, const at::Tensor& t);
  void add_output(Operand& operand, const at::Tensor& t);
  // Numbers the elements as they lie in the memory of a sample, which is laid out as empty_like(mu).
  void add_order(Philox& philox, const at::Tensor& mu);
  void finish(Space& space);

 private:
  struct Entry {
    int64_t* stride;
    bool* linear;
    at::DimVector view;
  };

  // `skipped` dimensions of the shape come before t's.
  void add(Operand& operand, const at::Tensor& t, void* data, int64_t skipped);
  void add(Operand& operand, const at::Tensor& t, void* data) { add(operand, t, data, lead_.dim() - t.dim()); }

  const at::Tensor& lead_;
  int64_t batch_dims_;
  c10::SmallVector<Entry, 8> entries_;
};

}  // namespace vaefast
