// A posterior's operator: sampling, the KL, or both, and their gradients.

#include <cmath>
#include <utility>

#include "device.h"
#include "operators/layout.h"
#include "operators/outputs.h"
#include "operators/posterior_problem.h"

namespace vaefast {

namespace {

bool has_prior(const PosteriorInputs& in) {
  return in.prior_mu || in.prior_logvar || in.prior_mu_value != 0 || in.prior_logvar_value != 0;
}

Activation activation_of(const Parameterization& p) {
  return {int32_t(p.kind), p.lo, p.hi, p.floor, std::isfinite(p.lo) || std::isfinite(p.hi), p.floor > 0};
}

void add_optional(Layout& layout, Operand& operand, const MaybeTensor& t, double value) {
  operand.value = value;
  if (t) layout.add(operand, *t);
}

// What forward and backward have in common.
PosteriorProblem posterior_problem(const PosteriorCall& call, Layout& layout) {
  const PosteriorInputs& in = call.in;
  TORCH_CHECK_VALUE(in.mu.sizes() == in.raw.sizes(), "vaefast: mu has shape ", in.mu.sizes(), ", raw ", in.raw.sizes());
  PosteriorProblem p;
  p.activation = activation_of(call.spec.parameterization);
  p.wide = is_wide(call);
  p.sample = call.asked.sample;
  p.kl = call.asked.kl;
  p.prior = p.kl && has_prior(in);
  layout.add(p.mu, in.mu);
  layout.add(p.raw, in.raw);
  if (p.prior) {
    add_optional(layout, p.prior_mu, in.prior_mu, in.prior_mu_value);
    add_optional(layout, p.prior_logvar, in.prior_logvar, in.prior_logvar_value);
  }
  if (p.sample && call.noise.eps) layout.add(p.eps, *call.noise.eps);
  return p;
}

void sum_to(Sum& sum, const Tensor& kl, const PosteriorCall& call) {
  sum.out = kl.mutable_data_ptr();
  sum.scale = scale_of(call.spec.reduced, call.in.mu.sizes());
}

void refuse_draws(const PosteriorCall& call) {
  TORCH_CHECK_VALUE(call.spec.reduced.kind != Reduction::kPerDraw, "vaefast: a KL has no draws to add up");
}

int64_t rows_of(const PosteriorCall& call, bool kl) { return kl ? batch_dims_of(call.spec.reduced) : 0; }

void use_seed(Philox& philox, const Tensor& seed, const Tensor& mu) {
  TORCH_CHECK_VALUE(
      seed.scalar_type() == at::kLong && seed.numel() == 2 && seed.is_contiguous() && seed.device() == mu.device(),
      "vaefast: seed must be two contiguous int64 words on ", mu.device());
  philox.on = true;
  philox.seed = seed.const_data_ptr<int64_t>();
  philox.offset = philox.seed + 1;
}

}  // namespace

bool is_wide(const PosteriorCall& call) {
  const PosteriorInputs& in = call.in;
  return is_double(in.mu) || is_double(in.raw) || is_double(in.prior_mu) || is_double(in.prior_logvar) ||
         is_double(call.noise.eps);
}

PosteriorOutputs empty_outputs(const PosteriorCall& call) {
  const PosteriorInputs& in = call.in;
  const auto& [eps, seed] = call.noise;
  PosteriorOutputs out;
  if (call.asked.sample) out.z = fresh_like(in.mu);
  if (call.asked.sample && !eps && !seed) out.seed = fresh({2}, in.mu.options().dtype(at::kLong));
  if (!call.asked.kl) return out;
  refuse_draws(call);
  if (is_reduced(call.spec.reduced)) {
    out.kl = empty_sum(in.mu, call.spec.reduced, is_wide(call));
  } else {
    auto dtype = promote(promote(in.mu.scalar_type(), in.raw), in.prior_mu);
    out.kl = fresh_like(in.mu, promote(dtype, in.prior_logvar));
  }
  return out;
}

PosteriorProblem forward_problem(const PosteriorCall& call, const PosteriorOutputs& out,
                                 const MaybeGenerator& generator) {
  const Tensor& mu = call.in.mu;
  Layout layout(mu, rows_of(call, call.asked.kl));
  PosteriorProblem p = posterior_problem(call, layout);
  if (p.sample) {
    layout.add_output(p.out_z, out.z);
    if (call.noise.seed) use_seed(p.philox, *call.noise.seed, mu);
    if (out.seed.defined()) {
      p.philox.on = true;
      device_for(mu.device().type()).philox(generator, mu.numel(), out.seed, p.philox);
    }
    if (p.philox.on) layout.add_order(p.philox, mu);
  }
  if (p.kl && is_reduced(call.spec.reduced)) {
    sum_to(p.sum, out.kl, call);
  } else if (p.kl) {
    layout.add_output(p.out_kl, out.kl);
  }
  layout.finish(p.space);
  return p;
}

PosteriorGradients::PosteriorGradients(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorCall& call,
                                       const Mask& mask, const Places& places)
    : dz_(dz), dkl_(dkl), call_(call), mask_(mask), grads_(places) {
  TORCH_CHECK_VALUE(mask.size() == 4, "vaefast: the mask has four entries");
  const PosteriorInputs& in = call.in;
  params_ = {&in.mu, &in.raw, in.prior_mu ? &*in.prior_mu : nullptr, in.prior_logvar ? &*in.prior_logvar : nullptr};
  for (int k = 0; k < 4; ++k) {
    if (!mask_[k]) continue;
    TORCH_CHECK_VALUE(params_[k], "vaefast: the mask wants the gradient of a prior that is no tensor");
    if (!grads_[k].defined()) grads_[k] = empty_grad(*params_[k], in.mu, wide());
  }
}

bool PosteriorGradients::wide() const { return is_wide(call_) || is_double(dz_) || is_double(dkl_); }

PosteriorProblem PosteriorGradients::problem(double factor, const Tensor& kl) const {
  const Tensor& mu = call_.in.mu;
  const PosteriorSpec& spec = call_.spec;
  refuse_draws(call_);
  Layout layout(mu, rows_of(call_, kl.defined()));
  PosteriorProblem p = posterior_problem(call_, layout);
  p.backward = true;
  p.wide = wide();
  if (p.sample) {
    layout.add(p.dz, *dz_);
    if (!call_.noise.eps) {
      TORCH_CHECK_VALUE(call_.noise.seed, "vaefast: backward of a sample needs its eps or its seed");
      use_seed(p.philox, *call_.noise.seed, mu);
      layout.add_order(p.philox, mu);
    }
  }
  if (p.kl) {
    p.dkl.value = 1.0;
    if (dkl_) layout.add_rows(p.dkl, *dkl_);
    const double scale = factor * scale_of(spec.reduced, mu.sizes());
    p.dkl_scale = scale * (spec.balance ? 1 - *spec.balance : 1);
    p.dkl_prior_scale = scale * spec.balance.value_or(1);
    if (kl.defined()) sum_to(p.sum, kl, call_);
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

Tensors posterior_forward(const PosteriorInputs& in, const Noise& noise, const MaybeGenerator& generator,
                          const PosteriorSpec& spec, const Asked& asked) {
  const PosteriorCall call{in, noise, spec, asked};
  const PosteriorOutputs out = empty_outputs(call);
  if (no_compute(in.mu)) return out.list();
  PosteriorProblem p = forward_problem(call, out, generator);
  Job job;
  job.posterior = &p;
  run(in.mu, job);
  return out.list();
}

Tensors posterior_backward_into(const Places& places, const MaybeTensor& dz, const MaybeTensor& dkl,
                                const PosteriorInputs& in, const Noise& noise, const PosteriorSpec& spec,
                                const Mask& mask) {
  TORCH_CHECK_VALUE(dz || dkl, "vaefast: backward without any incoming gradient");
  const PosteriorCall call{in, noise, spec, {dz.has_value(), dkl.has_value()}};
  PosteriorGradients grads(dz, dkl, call, mask, places);
  if (!no_compute(in.mu)) {
    PosteriorProblem p = grads.problem(1.0);
    Job job;
    job.posterior = &p;
    run(in.mu, job);
  }
  return grads.finish();
}

Tensors posterior_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in, const Noise& noise,
                           const PosteriorSpec& spec, const Mask& mask) {
  return posterior_backward_into({}, dz, dkl, in, noise, spec, mask);
}

}  // namespace vaefast
