// From a reconstruction's tensors to the problems of a device.

#include "operators/reconstruction_problem.h"

#include <algorithm>

#include "likelihoods/registries.h"
#include "operators/layout.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

const Traits& traits_of(LikelihoodIndex likelihood) { return likelihood_traits().at(size_t(likelihood)); }

// The space of a loss's elements, and how tensors are seen in it: a mixture's lie in planes along a dimension, of which
// the first stands for all.
class Sites {
 public:
  explicit Sites(const ReconstructionInputs& in) : mixture_(traits_of(in.likelihood).mixture()) {
    const Tensor& recon = in.params.at(0);
    if (mixture_) {
      const auto dim = int64_t(in.options.back());
      dim_ = dim < 0 ? dim + recon.dim() : dim;
      TORCH_CHECK_VALUE(dim_ > 0 && dim_ < recon.dim() && recon.sym_size(dim_) > 0, "vaefast: dim ", dim,
                        " of a tensor with ", recon.dim(), " dimensions");
      channels_ = traits_of(in.likelihood).channels[0] == 0 ? 0 : int(in.options.at(in.options.size() - 2));
    }
    lead_ = of(recon);
  }

  const Tensor& lead() const { return lead_; }
  Tensor of(const Tensor& param) const { return mixture_ ? param.select(dim_, 0) : param; }
  Tensor of_target(const Tensor& target) const {
    if (!channels_) return target;
    TORCH_CHECK_VALUE(target.dim() > dim_ && target.size(dim_) == channels_, "vaefast: target of shape ",
                      target.sizes());
    return target.select(dim_, 0);
  }
  int64_t step(const Tensor& param) const { return mixture_ ? param.stride(dim_) : 0; }
  bool mixture() const { return mixture_; }

  void set_planes(ReconstructionProblem& p, const ReconstructionInputs& in, const Traits& traits) const {
    const Tensor& recon = in.params[0];
    p.planes = int32_t(recon.size(dim_));
    p.param_step = step(recon);
    p.channels = channels_;
    if (channels_) p.target_step = in.target.stride(dim_);
    TORCH_CHECK_VALUE(std::count(traits.channels.begin(), traits.channels.end(), channels_), "vaefast: ", channels_,
                      " channels");
    TORCH_CHECK_VALUE(p.planes % (1 + traits.params_of(p.channels)) == 0, "vaefast: ", p.planes, " planes");
  }

 private:
  bool mixture_;
  int channels_ = 0;
  int64_t dim_ = 0;
  Tensor lead_;
};

ReconstructionProblem reconstruction_problem(const ReconstructionInputs& in, const Reduced& reduced,
                                             const ReconstructionOutputs& out, const Mask& mask, const Sites& sites,
                                             Layout& layout) {
  ReconstructionProblem p;
  const Tensor target = sites.of_target(in.target);
  TORCH_CHECK_VALUE(in.params.size() <= kMaxParams, "vaefast: too many parameters");
  TORCH_CHECK_VALUE(target.sizes() == sites.lead().sizes(), "vaefast: recon has shape ", in.params.at(0).sizes(),
                    ", target ", in.target.sizes());
  if (sites.mixture()) sites.set_planes(p, in, traits_of(in.likelihood));
  p.likelihood = int32_t(in.likelihood);
  std::copy(in.options.begin(), in.options.end(), p.options);
  p.nparams = int32_t(in.params.size());
  p.wide = is_wide(in);
  for (size_t k = 0; k < in.params.size(); ++k) layout.add(p.param[k], sites.of(in.params[k]));
  layout.add(p.target, target);
  if (in.weight) layout.add_weight(p.weight, *in.weight);
  p.grad_scale = scale_of(reduced, sites.lead().sizes());
  p.grad = !out.grads.empty();
  size_t next = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (!mask[k]) continue;
    const Tensor& grad = out.grads[next++];
    layout.add_output(p.out_grad[k], sites.of(grad));
    p.grad_step = sites.step(grad);
  }
  return p;
}

}  // namespace

bool is_wide(const ReconstructionInputs& in) {
  return is_double(in.target) || is_double(in.weight) ||
         std::any_of(in.params.begin(), in.params.end(), [](const Tensor& p) { return is_double(p); });
}

bool no_compute(const ReconstructionInputs& in) { return in.params[0].is_meta() && in.target.is_meta(); }

// A mixture of components with parameters leaves intermediate numbers where the gradients will be.
bool reads_first(LikelihoodIndex likelihood) {
  const Traits& t = traits_of(likelihood);
  return std::all_of(t.channels.begin(), t.channels.end(), [&](int c) { return t.params_of(c) == 0; });
}

void check_counts(const ReconstructionInputs& in) {
  const Traits& traits = traits_of(in.likelihood);
  const int given = int(in.params.size()), options = int(in.options.size());
  TORCH_CHECK_VALUE(given >= traits.required && given <= traits.params, "vaefast: ", given, " parameters, expected ",
                    traits.required, " to ", traits.params);
  TORCH_CHECK_VALUE(options == traits.options, "vaefast: ", options, " options, expected ", traits.options);
}

Tensors ReconstructionOutputs::finish(const ReconstructionInputs& in, const Mask& mask) const {
  Tensors out;
  size_t next = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (mask[k]) out.push_back(finish_grad(grads[next++], in.params[k]));
  }
  return out;
}

ReconstructionOutputs empty_grads(const ReconstructionInputs& in, const Mask& mask, const Mask& over) {
  ReconstructionOutputs out;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (!mask[k]) continue;
    const Tensor& param = in.params.at(k);
    out.grads.push_back(!over.empty() && over[k] ? param : empty_grad(param, in.params[0], is_wide(in)));
  }
  return out;
}

ReconstructionOutputs empty_outputs(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask,
                                    const Mask& over) {
  ReconstructionOutputs out = empty_grads(in, mask, over);
  const Sites sites(in);
  const Tensor& lead = sites.lead();
  if (is_reduced(reduced)) {
    out.nll = empty_sum(lead, reduced, is_wide(in));
  } else {
    auto dtype = promote(lead.scalar_type(), in.target);
    for (const Tensor& p : in.params) dtype = promote(dtype, p);
    out.nll = fresh_like(lead, dtype);
  }
  return out;
}

ReconstructionProblem forward_problem(const ReconstructionInputs& in, const Reduced& reduced,
                                      const ReconstructionOutputs& out, const Mask& mask) {
  const Sites sites(in);
  Layout layout(sites.lead(), batch_dims_of(reduced));
  ReconstructionProblem p = reconstruction_problem(in, reduced, out, mask, sites, layout);
  p.nll = true;
  if (is_reduced(reduced)) {
    p.sum.out = out.nll.mutable_data_ptr();
    p.sum.scale = p.grad_scale.wide;
  } else {
    layout.add_output(p.out_nll, out.nll);
  }
  layout.finish(p.space);
  return p;
}

ReconstructionProblem backward_problem(const Tensor& upstream, const ReconstructionInputs& in, const Reduced& reduced,
                                       const ReconstructionOutputs& out, const Mask& mask) {
  const Sites sites(in);
  Layout layout(sites.lead(), 0);
  ReconstructionProblem p = reconstruction_problem(in, reduced, out, mask, sites, layout);
  p.wide = p.wide || is_double(upstream);
  layout.add_rows(p.upstream, upstream);
  layout.finish(p.space);
  return p;
}

ReconstructionProblem rescale_problem(const Tensors& kept, const Tensor& upstream, int64_t batch_dims) {
  const Tensor& lead = *std::max_element(kept.begin(), kept.end(),
                                         [](const Tensor& a, const Tensor& b) { return a.numel() < b.numel(); });
  Layout layout(lead, batch_dims);
  ReconstructionProblem p;
  const bool one = is_one(upstream);
  p.kept = true;
  p.nparams = 0;
  p.wide = is_double(upstream);
  for (const Tensor& grad : kept) {
    if (grad.sizes() != lead.sizes() || p.nparams == kMaxParams) {
      if (!one) Tensor(grad).mul_(by_rows(upstream, grad.dim()));
      continue;
    }
    layout.add_output(p.out_grad[p.nparams++], grad);
    p.wide = p.wide || is_double(grad);
  }
  layout.add_rows(p.upstream, upstream);
  layout.finish(p.space);
  return p;
}

}  // namespace vaefast
