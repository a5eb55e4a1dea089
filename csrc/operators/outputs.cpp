#include "operators/outputs.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <utility>

#include "device.h"

namespace vaefast {

namespace {

void check_batch(const Tensor& t, const Reduced& r) {
  TORCH_CHECK_VALUE(t.dim() >= batch_dims_of(r) && (t.dim() > 0 || r.kind != Reduction::kBatchMean),
                    "vaefast: a sum per sample needs a batch dimension");
}

}  // namespace

bool is_double(const Tensor& t) { return t.scalar_type() == at::kDouble; }
bool is_double(const MaybeTensor& t) { return t && is_double(*t); }

at::ScalarType promote(at::ScalarType dtype, const Tensor& t) {
  return t.scalar_type() == at::kBool ? dtype : c10::promoteTypes(dtype, t.scalar_type());
}

at::ScalarType promote(at::ScalarType dtype, const MaybeTensor& t) { return t ? promote(dtype, *t) : dtype; }

Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return at::detail::empty_cpu(sizes, c10::typeMetaToScalarType(options.dtype()));
}

Tensor fresh_like(const Tensor& t, at::ScalarType dtype) {
  if (!t.is_cpu() || !t.is_non_overlapping_and_dense()) return at::empty_like(t, t.options().dtype(dtype));
  return at::detail::empty_strided_cpu(t.sizes(), t.strides(), dtype);
}

Tensor fresh_like(const Tensor& t) { return fresh_like(t, t.scalar_type()); }

bool is_reduced(const Reduced& r) { return r.kind != Reduction::kNone; }

int64_t batch_dims_of(const Reduced& r) {
  return r.kind == Reduction::kPerDraw ? 2 : r.kind == Reduction::kPerSample ? 1 : 0;
}

double scale_of(const Reduced& r, at::IntArrayRef shape) {
  if (r.kind == Reduction::kBatchMean) return 1.0 / double(shape.at(0));
  if (r.kind == Reduction::kMean) return 1.0 / double(c10::multiply_integers(shape));
  return 1.0;
}

Tensor empty_sum(const Tensor& like, const Reduced& r, bool wide) {
  check_batch(like, r);
  const auto options = like.options().dtype(wide ? at::kDouble : at::kFloat);
  const int64_t dims = batch_dims_of(r);
  return dims == 0 ? fresh({}, options) : at::empty_symint(like.sym_sizes().slice(0, dims), options);
}

bool no_compute(const Tensor& t) { return t.is_meta(); }

void run(const Tensor& on, Job& job) {
  const Device& device = device_for(on.device().type());
  TORCH_CHECK_NOT_IMPLEMENTED(device.run, "vaefast: no kernels for ", on.device().type());
  device.run(on, job);
}

Tensor empty_grad(const Tensor& param, const Tensor& lead, bool wide) {
  if (param.sym_sizes() == lead.sym_sizes()) return fresh_like(param);
  if (no_compute(lead)) return at::empty_symint(param.sym_sizes(), param.options());
  return at::empty(lead.sizes(), param.options().dtype(wide ? at::kDouble : at::kFloat));
}

Tensor finish_grad(Tensor grad, const Tensor& param) {
  if (grad.sym_sizes() == param.sym_sizes()) return grad;
  return at::sum_to(std::move(grad), param.sizes()).to(param.scalar_type());
}

}  // namespace vaefast
