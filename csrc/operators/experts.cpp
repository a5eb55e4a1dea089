// The product of Gaussian experts, and its gradients.

#include <ATen/ops/empty.h>

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

// What the loops take: contiguous memory in the arithmetic type, which most tensors are already.
class Products {
 public:
  explicit Products(const ExpertsInputs& in) : in_(in) {
    const auto sizes = in.mus.sym_sizes();
    TORCH_CHECK_VALUE(sizes.size() >= 2 && sizes[0] > 0 && in.logvars.sym_sizes() == sizes,
                      "vaefast: experts of shape ", sizes, " and ", in.logvars.sym_sizes());
    TORCH_CHECK_TYPE(at::isFloatingType(in.mus.scalar_type()) && at::isFloatingType(in.logvars.scalar_type()),
                     "vaefast: experts of ", in.mus.scalar_type(), " and ", in.logvars.scalar_type());
    dtype_ = promote(promote(at::kFloat, in.mus), in.logvars);
    if (in.there) check(*in.there);
  }

  c10::SymIntArrayRef sizes() const { return in_.mus.sym_sizes().slice(1); }
  at::TensorOptions options() const { return in_.mus.options().dtype(dtype_); }

  ExpertsProblem problem() {
    ExpertsProblem p;
    p.experts = in_.mus.size(0);
    p.columns = c10::multiply_integers(in_.mus.sizes().slice(1));
    p.wide = dtype_ == at::kDouble;
    p.prior = in_.prior;
    p.mus = data(in_.mus);
    p.logvars = data(in_.logvars);
    if (in_.there) p.there = rows(*in_.there, p.rows);
    return p;
  }

  const void* data(const Tensor& t) {
    check_device(t);
    return hold(t.to(dtype_));
  }
  // of a result, null for 0
  const void* data(const MaybeTensor& t) {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->sym_sizes() == sizes(), "vaefast: a gradient of shape ", t->sym_sizes(),
                      " for the product of experts ", in_.mus.sym_sizes());
    return data(*t);
  }

  void run(const ExpertsProblem& p) const { vaefast::run(in_.mus, p, &Device::experts, "the product"); }

 private:
  void check(const Tensor& there) const {
    TORCH_CHECK_TYPE(there.scalar_type() == at::kBool, "vaefast: which experts there are is told by bools, not ",
                     there.scalar_type());
    const auto own = there.sym_sizes(), all = in_.mus.sym_sizes();
    bool fits = !own.empty() && own.size() <= all.size();
    for (size_t d = 0; fits && d < own.size(); ++d) fits = own[d] == all[d] || own[d] == 1;
    TORCH_CHECK_VALUE(fits, "vaefast: a mask of shape ", own, " for experts ", all);
  }

  void check_device(const Tensor& t) const {
    TORCH_CHECK_VALUE(t.device() == in_.mus.device(), "vaefast: tensors on ", t.device(), " and ", in_.mus.device());
  }

  // As many rows as the mask tells apart, and no more.
  const bool* rows(Tensor there, int64_t& count) {
    check_device(there);
    while (there.dim() > 1 && there.size(-1) == 1) there = there.squeeze(-1);
    const auto sizes = in_.mus.sizes().slice(0, there.dim());
    count = c10::multiply_integers(sizes.slice(1));
    return static_cast<const bool*>(hold(there.expand(sizes)));
  }

  const void* hold(const Tensor& t) {
    held_.push_back(t.contiguous());
    return held_.back().const_data_ptr();
  }

  const ExpertsInputs& in_;
  at::ScalarType dtype_ = at::kFloat;
  Tensors held_;
};

}  // namespace

Tensors experts_forward(const ExpertsInputs& in) {
  Products call(in);
  if (no_compute(in.mus)) {
    return {at::empty_symint(call.sizes(), in.mus.options()), at::empty_symint(call.sizes(), in.logvars.options())};
  }
  const auto sizes = in.mus.sizes().slice(1);
  const Tensor mu = fresh(sizes, call.options()), logvar = fresh(sizes, call.options());
  ExpertsProblem p = call.problem();
  p.mu = mu.mutable_data_ptr();
  p.logvar = logvar.mutable_data_ptr();
  call.run(p);
  return {mu.to(in.mus.scalar_type()), logvar.to(in.logvars.scalar_type())};
}

Tensors experts_backward(const MaybeTensor& dmu, const MaybeTensor& dlogvar, const ExpertsInputs& in,
                         const Mask& mask) {
  TORCH_CHECK_VALUE(dmu || dlogvar, "vaefast: backward without any incoming gradient");
  TORCH_CHECK_VALUE(mask.size() == 2, "vaefast: the mask has an entry for means and one for log variances");
  Products call(in);
  const Tensor given[] = {in.mus, in.logvars};
  Tensors out;
  if (no_compute(in.mus)) {
    for (int k = 0; k < 2; ++k) {
      if (mask[k]) out.push_back(at::empty_symint(given[k].sym_sizes(), given[k].options()));
    }
    return out;
  }
  ExpertsProblem p = call.problem();
  p.backward = true;
  p.dmu = call.data(dmu);
  p.dlogvar = call.data(dlogvar);
  void** places[] = {&p.dmus, &p.dlogvars};
  for (int k = 0; k < 2; ++k) {
    if (!mask[k]) continue;
    out.push_back(fresh(in.mus.sizes(), call.options()));
    *places[k] = out.back().mutable_data_ptr();
  }
  if (out.empty()) return out;
  call.run(p);
  for (size_t k = 0, next = 0; k < 2; ++k) {
    if (mask[k]) out[next] = out[next].to(given[k].scalar_type()), ++next;
  }
  return out;
}

}  // namespace vaefast
