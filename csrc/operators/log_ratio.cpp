// The log density ratios of draws, and their gradients.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <utility>

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

// What the loops take: contiguous memory in the arithmetic type, which most tensors are already.
class Ratios {
 public:
  explicit Ratios(const LogRatioInputs& in) : in_(in), dtype_(in.z.scalar_type()) {
    const auto sizes = in.z.sym_sizes();
    TORCH_CHECK_VALUE(
        sizes.size() >= 2 && sizes.slice(1) == in.mu.sym_sizes() && in.mu.sym_sizes() == in.logvar.sym_sizes(),
        "vaefast: draws of shape ", sizes, " of a posterior of ", in.mu.sym_sizes(), " and ", in.logvar.sym_sizes());
    TORCH_CHECK_VALUE(in.prior || !(in.prior_mu || in.prior_logvar), "vaefast: a prior that is not asked for");
    for (const Tensor& t : {in.mu, in.logvar}) dtype_ = promote(dtype_, t);
    dtype_ = promote(promote(promote(dtype_, in.prior_mu), in.prior_logvar), at::kFloat);
  }

  at::ScalarType dtype() const { return dtype_; }
  at::TensorOptions options() const { return in_.z.options().dtype(dtype_); }

  LogRatioProblem problem() {
    LogRatioProblem p;
    p.draws = in_.z.size(0);
    p.samples = in_.z.size(1);
    p.latents = c10::multiply_integers(in_.z.sizes().slice(2));
    p.wide = dtype_ == at::kDouble;
    p.z = data(in_.z);
    p.q = numbers(in_.mu, in_.logvar);
    if (!in_.prior) return p;
    const bool given = in_.prior_mu || in_.prior_logvar || in_.prior_mu_value != 0 || in_.prior_logvar_value != 0;
    p.prior = given ? DrawPrior::kGiven : DrawPrior::kStandard;
    if (given) p.p = numbers(whole(in_.prior_mu, in_.prior_mu_value), whole(in_.prior_logvar, in_.prior_logvar_value));
    return p;
  }

  const void* data(const Tensor& t) {
    TORCH_CHECK_VALUE(t.device() == in_.z.device(), "vaefast: tensors on ", t.device(), " and ", in_.z.device());
    held_.push_back(t.to(dtype_).contiguous());
    return held_.back().const_data_ptr();
  }

  void run(const LogRatioProblem& p) const { vaefast::run(in_.z, p, &Device::log_ratio, "the log ratios"); }

 private:
  GaussianNumbers numbers(const Tensor& mu, const Tensor& logvar) {
    GaussianNumbers g;
    g.mu = data(mu);
    g.logvar = data(logvar);
    g.root = data(held_.back().mul(-0.5).exp_());
    return g;
  }

  Tensor whole(const MaybeTensor& t, double value) const {
    return t ? t->expand(in_.mu.sizes()) : at::full(in_.mu.sizes(), value, options());
  }

  static at::ScalarType promote(at::ScalarType a, at::ScalarType b) { return c10::promoteTypes(a, b); }
  static at::ScalarType promote(at::ScalarType a, const Tensor& t) { return promote(a, t.scalar_type()); }
  static at::ScalarType promote(at::ScalarType a, const MaybeTensor& t) { return t ? promote(a, *t) : a; }

  const LogRatioInputs& in_;
  at::ScalarType dtype_;
  Tensors held_;
};

}  // namespace

Tensor log_ratio_forward(const LogRatioInputs& in) {
  Ratios call(in);
  Tensor out = at::empty_symint(in.z.sym_sizes().slice(0, 2), call.options());
  if (no_compute(in.z)) return out;
  LogRatioProblem p = call.problem();
  p.ratio = out.mutable_data_ptr();
  call.run(p);
  return out;
}

Tensors log_ratio_backward(const Tensor& g, const LogRatioInputs& in, const Mask& mask) {
  Ratios call(in);
  const MaybeTensor given[] = {in.z, in.mu, in.logvar, in.prior_mu, in.prior_logvar};
  TORCH_CHECK_VALUE(mask.size() == 5 && (in.prior_mu || !mask[3]) && (in.prior_logvar || !mask[4]),
                    "vaefast: the mask has an entry for each of the draws, q and the prior");
  TORCH_CHECK_VALUE(g.sym_sizes() == in.z.sym_sizes().slice(0, 2), "vaefast: a gradient of shape ", g.sym_sizes(),
                    " for the ratios of ", in.z.sym_sizes());
  Tensors out;
  if (no_compute(in.z)) {
    for (int k = 0; k < 5; ++k) {
      if (mask[k]) out.push_back(at::empty_symint(given[k]->sym_sizes(), given[k]->options()));
    }
    return out;
  }
  Tensors found(5);
  // the draws' is written in any case, the others where they are wanted
  for (int k = 0; k < 5; ++k) {
    if (k == 0 || mask[k]) found[k] = at::empty(k ? in.mu.sizes() : in.z.sizes(), call.options());
  }
  LogRatioProblem p = call.problem();
  p.backward = true;
  p.g = call.data(g);
  void** outs[] = {&p.dz, &p.dmu, &p.dlogvar, &p.dprior_mu, &p.dprior_logvar};
  for (int k = 0; k < 5; ++k) {
    if (found[k].defined()) *outs[k] = found[k].mutable_data_ptr();
  }
  call.run(p);
  for (int k = 0; k < 5; ++k) {
    if (mask[k]) out.push_back(finish_grad(std::move(found[k]), *given[k]).to(given[k]->scalar_type()));
  }
  return out;
}

}  // namespace vaefast
