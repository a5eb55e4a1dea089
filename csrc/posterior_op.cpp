// A posterior's operator: sampling, the KL, or both, and their gradients.

#include "posterior_op.h"

#include <ATen/ATen.h>

#include <utility>

#include "problem.h"
#include "results.h"

namespace vaefast {

namespace {

bool has_prior(const PosteriorInputs& in, const PosteriorSpec& spec) {
  return in.prior_mu || in.prior_logvar || spec.prior_mu != 0 || spec.prior_logvar != 0;
}

void add_optional(Layout& layout, Operand& operand, const MaybeTensor& t, double value) {
  operand.value = value;
  if (t) layout.add(operand, *t);
}

// What forward and backward have in common.
PosteriorProblem posterior_problem(const PosteriorInputs& in, const PosteriorSpec& spec, Layout& layout) {
  TORCH_CHECK_VALUE(in.mu.sizes() == in.raw.sizes(), "vaefast: mu has shape ", in.mu.sizes(), ", raw ", in.raw.sizes());
  PosteriorProblem p;
  p.activation = spec.activation;
  p.wide = is_wide(in);
  p.sample = spec.sample;
  p.kl = spec.kl;
  p.prior = spec.kl && has_prior(in, spec);
  layout.add(p.mu, in.mu);
  layout.add(p.raw, in.raw);
  if (p.prior) {
    add_optional(layout, p.prior_mu, in.prior_mu, spec.prior_mu);
    add_optional(layout, p.prior_logvar, in.prior_logvar, spec.prior_logvar);
  }
  if (spec.sample && in.eps) layout.add(p.eps, *in.eps);
  return p;
}

void sum_to(Sum& sum, const Tensor& kl, Reduction reduction, at::IntArrayRef shape) {
  sum.out = kl.mutable_data_ptr();
  sum.scale = scale_of(reduction, shape);
}

}  // namespace

void use_seed(Philox& philox, const Tensor& seed, const Tensor& mu) {
  TORCH_CHECK_VALUE(
      seed.scalar_type() == at::kLong && seed.numel() == 2 && seed.is_contiguous() && seed.device() == mu.device(),
      "vaefast: seed must be two contiguous int64 words on ", mu.device());
  philox.on = true;
  philox.seed = seed.const_data_ptr<int64_t>();
  philox.offset = philox.seed + 1;
}

PosteriorOutputs empty_outputs(const PosteriorInputs& in, const PosteriorSpec& spec) {
  PosteriorOutputs out;
  if (spec.sample) out.z = fresh_like(in.mu);
  if (spec.sample && !in.eps && !in.seed) out.seed = fresh({2}, in.mu.options().dtype(at::kLong));
  if (!spec.kl) return out;
  if (is_reduced(spec.reduction)) {
    out.kl = empty_sum(in.mu, spec.reduction, is_wide(in));
  } else {
    auto dtype = promote(promote(in.mu.scalar_type(), in.raw), in.prior_mu);
    out.kl = fresh_like(in.mu, promote(dtype, in.prior_logvar));
  }
  return out;
}

PosteriorProblem forward_problem(const PosteriorInputs& in, const PosteriorSpec& spec, const PosteriorOutputs& out) {
  Layout layout(in.mu, spec.kl && spec.reduction == Reduction::kPerSample);
  PosteriorProblem p = posterior_problem(in, spec, layout);
  if (spec.sample) {
    layout.add_output(p.out_z, out.z);
    if (in.seed) use_seed(p.philox, *in.seed, in.mu);
    if (out.seed.defined()) {
      p.philox.on = true;
      device_for(in.mu.device().type()).philox(in.generator, in.mu.numel(), out.seed, p.philox);
    }
    if (p.philox.on) layout.add_order(p.philox, in.mu);
  }
  if (spec.kl && is_reduced(spec.reduction)) {
    sum_to(p.sum, out.kl, spec.reduction, in.mu.sizes());
  } else if (spec.kl) {
    layout.add_output(p.out_kl, out.kl);
  }
  layout.finish(p.space);
  return p;
}

PosteriorGradients::PosteriorGradients(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in,
                                       const PosteriorSpec& spec, const Mask& mask, const Places& places)
    : dz_(dz), dkl_(dkl), in_(in), spec_(spec), mask_(mask), grads_(places) {
  TORCH_CHECK_VALUE(mask.size() == 4, "vaefast: the mask has four entries");
  params_ = {&in_.mu, &in_.raw, in_.prior_mu ? &*in_.prior_mu : nullptr,
             in_.prior_logvar ? &*in_.prior_logvar : nullptr};
  for (int k = 0; k < 4; ++k) {
    if (!mask_[k]) continue;
    TORCH_CHECK_VALUE(params_[k], "vaefast: the mask wants the gradient of a prior that is no tensor");
    if (!grads_[k].defined()) grads_[k] = empty_grad(*params_[k], in_.mu, wide());
  }
}

bool PosteriorGradients::wide() const { return is_wide(in_) || is_double(dz_) || is_double(dkl_); }

PosteriorProblem PosteriorGradients::problem(double factor, const Tensor& kl) const {
  Layout layout(in_.mu, kl.defined() && spec_.reduction == Reduction::kPerSample);
  PosteriorProblem p = posterior_problem(in_, spec_, layout);
  p.backward = true;
  p.wide = wide();
  if (spec_.sample) {
    layout.add(p.dz, *dz_);
    if (!in_.eps) {
      TORCH_CHECK_VALUE(in_.seed, "vaefast: backward of a sample needs its eps or its seed");
      use_seed(p.philox, *in_.seed, in_.mu);
      layout.add_order(p.philox, in_.mu);
    }
  }
  if (spec_.kl) {
    p.dkl.value = 1.0;
    if (dkl_) layout.add_rows(p.dkl, *dkl_);
    const double scale = factor * scale_of(spec_.reduction, in_.mu.sizes());
    p.dkl_scale = scale * (spec_.balance ? 1 - *spec_.balance : 1);
    p.dkl_prior_scale = scale * spec_.balance.value_or(1);
    if (kl.defined()) sum_to(p.sum, kl, spec_.reduction, in_.mu.sizes());
  }
  Operand* outs[4] = {&p.out_dmu, &p.out_draw, &p.out_dprior_mu, &p.out_dprior_logvar};
  for (int k = 0; k < 4; ++k) {
    if (!mask_[k]) continue;
    // without a KL the prior has no part in the result
    if (k >= 2 && !p.prior) {
      grads_[k].zero_();
    } else {
      layout.add_output(*outs[k], grads_[k]);
    }
  }
  layout.finish(p.space);
  return p;
}

Tensors PosteriorGradients::finish() {
  Tensors result;
  for (int k = 0; k < 4; ++k) {
    if (mask_[k]) result.push_back(finish_grad(std::move(grads_[k]), *params_[k]));
  }
  return result;
}

Tensors posterior_forward(const PosteriorInputs& in, const PosteriorSpec& spec) {
  const PosteriorOutputs out = empty_outputs(in, spec);
  if (no_compute(in.mu)) return out.list();
  PosteriorProblem p = forward_problem(in, spec, out);
  Job job;
  job.posterior = &p;
  run(in.mu, job);
  return out.list();
}

Tensors posterior_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in,
                           const PosteriorSpec& spec, const Mask& mask, const Places& places) {
  TORCH_CHECK_VALUE(dz || dkl, "vaefast: backward without any incoming gradient");
  PosteriorSpec reached = spec;
  reached.sample = dz.has_value();
  reached.kl = dkl.has_value();
  PosteriorGradients grads(dz, dkl, in, reached, mask, places);
  if (!no_compute(in.mu)) {
    PosteriorProblem p = grads.problem(1.0);
    Job job;
    job.posterior = &p;
    run(in.mu, job);
  }
  return grads.finish();
}

}  // namespace vaefast
