// From tensors to problems: dtypes, the iteration space, operands with coalesced strides.

#include "operators/layout.h"

#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <utility>

namespace vaefast {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kHalf:
      return DType::kHalf;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kBool:
      return DType::kBool;
    default:
      TORCH_CHECK_TYPE(false, "vaefast: dtype ", t.scalar_type(), " is not float16, bfloat16, float32 or float64");
  }
}

Layout::Layout(const at::Tensor& lead, int64_t batch_dims) : lead_(lead), batch_dims_(batch_dims) {}

void Layout::add(Operand& operand, const at::Tensor& t, void* data, int64_t skipped) {
  TORCH_CHECK_VALUE(t.device() == lead_.device(), "vaefast: tensors on ", t.device(), " and ", lead_.device());
  operand.data = data;
  operand.dtype = dtype_of(t);
  const auto shape = lead_.sizes(), sizes = t.sizes(), strides = t.strides();
  TORCH_CHECK_VALUE(skipped >= 0 && t.dim() <= lead_.dim(), "vaefast: shape ", sizes, " has more dimensions than ",
                    shape);
  // what at::expand would give, without an operator's cost
  at::DimVector view(lead_.dim(), 0);
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t size = shape[skipped + d];
    TORCH_CHECK_VALUE(sizes[d] == size || sizes[d] == 1, "vaefast: shape ", sizes, " does not broadcast to ", shape);
    view[skipped + d] = sizes[d] == 1 && size != 1 ? 0 : strides[d];
  }
  entries_.push_back({operand.stride, &operand.linear, std::move(view)});
}

void Layout::add(Operand& operand, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() != at::kBool, "vaefast: only a weight may be bool");
  add(operand, t, const_cast<void*>(t.const_data_ptr()));
}

void Layout::add_rows(Operand& operand, const at::Tensor& t) {
  add(operand, t, const_cast<void*>(t.const_data_ptr()), 0);
}

void Layout::add_weight(Operand& operand, const at::Tensor& t) {
  add(operand, t, const_cast<void*>(t.const_data_ptr()));
}

void Layout::add_output(Operand& operand, const at::Tensor& t) { add(operand, t, t.mutable_data_ptr()); }

void Layout::add_order(Philox& philox, const at::Tensor& mu) {
  at::DimVector strides(mu.strides());
  if (!mu.is_non_overlapping_and_dense()) strides = at::infer_dense_strides(mu.sizes(), mu.strides());
  entries_.push_back({philox.stride, &philox.linear, std::move(strides)});
}

void Layout::finish(Space& space) {
  const auto sizes = lead_.sizes();
  at::DimVector order, strides(lead_.strides());
  bool broadcast = false;
  for (int64_t d = 0; d < lead_.dim(); ++d) {
    if (sizes[d] == 1) continue;
    order.push_back(d);
    broadcast = broadcast || strides[d] == 0;
  }
  // the order of what is written, which has memory for every element
  if (broadcast) strides = at::infer_dense_strides(sizes, strides);
  auto first = order.begin();
  while (first != order.end() && *first < batch_dims_) ++first;
  std::stable_sort(first, order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });

  // merge a dimension into the one before it where every operand steps through both evenly
  c10::SmallVector<std::pair<int64_t, int64_t>, kMaxDims> dims;  // size, innermost original dimension
  for (int64_t d : order) {
    const bool merges = !dims.empty() && std::all_of(entries_.begin(), entries_.end(), [&](const Entry& e) {
      return e.view[dims.back().second] == e.view[d] * sizes[d];
    });
    if (merges) {
      dims.back() = {dims.back().first * sizes[d], d};
    } else {
      dims.emplace_back(sizes[d], d);
    }
  }
  TORCH_CHECK_VALUE(dims.size() <= kMaxDims, "vaefast: more than ", kMaxDims,
                    " dimensions that do not merge; call contiguous()");

  space.numel = lead_.numel();
  space.rows = c10::multiply_integers(sizes.slice(0, batch_dims_));
  space.ndim = std::max<int32_t>(1, int32_t(dims.size()));
  space.size[0] = 1;
  for (size_t k = 0; k < dims.size(); ++k) space.size[k] = dims[k].first;
  for (Entry& e : entries_) {
    e.stride[0] = 1;  // a single element, where no dimension is left
    int64_t dense = 1;
    *e.linear = true;
    for (size_t k = dims.size(); k-- > 0; dense *= dims[k].first) {
      e.stride[k] = e.view[dims[k].second];
      *e.linear = *e.linear && e.stride[k] == dense;
    }
  }
}

}  // namespace vaefast
