// Categorical latents: the KL of each site or reduced, a one-hot sample, and their gradients.

#include <ATen/ops/empty.h>

#include <utility>

#include "device.h"
#include "operators/layout.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

// A site's tensors, one of them with a dimension of classes, of which the first stands for all.
class Call {
 public:
  explicit Call(const CategoricalInputs& in) : in_(in), dim_(in.dim < 0 ? in.dim + in.logits.dim() : in.dim) {
    const Tensor& logits = in.logits;
    TORCH_CHECK_VALUE(dim_ >= 0 && dim_ < logits.dim() && logits.sym_size(dim_) > 0, "vaefast: no classes along dim ",
                      in.dim, " of ", logits.sym_sizes());
    TORCH_CHECK_VALUE(in.reduced.kind != Reduction::kPerDraw, "vaefast: a KL has no draws to add up");
    TORCH_CHECK_VALUE(in.unimix >= 0 && in.unimix < 1, "vaefast: unimix ", in.unimix);
    check(in.prior);
    lead_ = of(logits);
  }

  const Tensor& lead() const { return lead_; }
  Tensor of(const Tensor& t) const { return t.select(dim_, 0); }
  bool wide() const { return is_double(in_.logits) || is_double(in_.prior); }

  void check(const MaybeTensor& t) const {
    TORCH_CHECK_VALUE(!t || t->sym_sizes() == in_.logits.sym_sizes(), "vaefast: logits have shape ",
                      in_.logits.sym_sizes(), ", not ", t->sym_sizes());
  }

  CategoricalProblem problem(bool kl, Layout& layout) const {
    CategoricalProblem p;
    p.classes = in_.logits.size(dim_);
    p.wide = wide();
    p.kl = kl;
    p.share = 1 - in_.unimix;
    p.uniform = in_.unimix / double(p.classes) / (1 - in_.unimix);
    add(layout, p.logits, p.logits_step, in_.logits);
    if (kl && in_.prior) add(layout, p.prior, p.prior_step, *in_.prior);
    return p;
  }

  void add(Layout& layout, Operand& operand, int64_t& step, const Tensor& t) const {
    layout.add(operand, of(t));
    step = t.stride(dim_);
  }

  void run(CategoricalProblem& p, Layout& layout) const {
    layout.finish(p.space);
    vaefast::run(in_.logits, p, &Device::categorical, "categorical latents");
  }

 private:
  const CategoricalInputs& in_;
  int64_t dim_;
  Tensor lead_;
};

}  // namespace

Tensors categorical_forward(const MaybeTensor& uniforms, const CategoricalInputs& in, bool kl) {
  const Call call(in);
  const Tensor& lead = call.lead();
  Tensors out;
  Tensor each;
  if (uniforms) out.push_back(fresh_like(in.logits));
  if (kl) {
    each = at::empty_symint(lead.sym_sizes(), lead.options().dtype(call.wide() ? at::kDouble : at::kFloat));
    out.push_back(is_reduced(in.reduced) ? empty_sum(lead, in.reduced, call.wide()) : each);
  }
  if (no_compute(in.logits)) return out;

  Layout layout(lead, kl ? batch_dims_of(in.reduced) : 0);
  CategoricalProblem p = call.problem(kl, layout);
  if (uniforms) {
    TORCH_CHECK_VALUE(uniforms->sizes() == lead.sizes() && is_double(*uniforms),
                      "vaefast: uniforms are float64, one a site, got ", uniforms->sizes(), " of ",
                      uniforms->scalar_type());
    layout.add(p.uniforms, *uniforms);
    call.add(layout, p.out_z, p.out_z_step, out[0]);
  }
  if (kl) {
    layout.add_output(p.out_kl, each);
    p.each = each.const_data_ptr();
    if (is_reduced(in.reduced)) {
      p.sum.out = out.back().mutable_data_ptr();
      p.sum.scale = scale_of(in.reduced, lead.sizes());
    }
  }
  call.run(p, layout);
  return out;
}

Tensors categorical_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const CategoricalInputs& in,
                             const Mask& mask) {
  TORCH_CHECK_VALUE(dz || dkl, "vaefast: backward without any incoming gradient");
  TORCH_CHECK_VALUE(mask.size() == 2 && (in.prior || !mask[1]),
                    "vaefast: the mask has an entry for each of the logits");
  const Call call(in);
  call.check(dz);
  Tensors out;
  if (mask[0]) out.push_back(fresh_like(in.logits));
  if (mask[1]) out.push_back(fresh_like(*in.prior));
  if (no_compute(in.logits)) return out;

  Layout layout(call.lead(), 0);
  CategoricalProblem p = call.problem(dkl.has_value(), layout);
  p.backward = true;
  if (dz) call.add(layout, p.dz, p.dz_step, *dz);
  if (dkl) {
    layout.add_rows(p.dkl, *dkl);
    const double scale = scale_of(in.reduced, call.lead().sizes());
    p.dkl_scale = scale * (in.balance ? 1 - *in.balance : 1);
    p.dkl_prior_scale = scale * in.balance.value_or(1);
  }
  if (mask[0]) call.add(layout, p.out_dlogits, p.out_dlogits_step, out[0]);
  // without a KL the prior has no part in the result
  if (mask[1]) dkl ? call.add(layout, p.out_dprior, p.out_dprior_step, out.back()) : void(out.back().zero_());
  call.run(p, layout);
  return out;
}

}  // namespace vaefast
