// A reconstruction's and an ELBO's operators: outputs allocated, problems built and run. The same functions serve CPU,
// CUDA and Meta.

#include "compute.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "likelihoods.h"
#include "posterior.h"
#include "posterior_op.h"
#include "problem.h"
#include "results.h"

namespace vaefast {

namespace {

template <class List>
int64_t index_of(Name name, const char* what) {
  static const auto names = names_of(List{});
  const auto found = std::find(names.begin(), names.end(), std::string(name));
  TORCH_CHECK_VALUE(found != names.end(), "vaefast: unknown ", what, " '", name, "'");
  return found - names.begin();
}

Activation make_activation(int64_t kind, double lo, double hi, double floor) {
  return {int32_t(kind), lo, hi, floor, std::isfinite(lo) || std::isfinite(hi), floor > 0};
}

bool is_wide(const ReconstructionInputs& in) {
  return is_double(in.target) || is_double(in.weight) ||
         std::any_of(in.params.begin(), in.params.end(), [](const Tensor& p) { return is_double(p); });
}

// What is known of a likelihood from its struct.
struct Traits {
  int required, params, options;
  std::vector<int> channels;  // a mixture's
  int (*params_of)(int channels);

  bool mixture() const { return !channels.empty(); }
};

template <class L>
Traits traits_of() {
  static_assert(L::params <= kMaxParams && kOptions<L> <= kMaxOptions);
  Traits t{L::required, L::params, kOptions<L>, {}, nullptr};
  if constexpr (kMixture<L>) {
    t.channels = channels_of(typename L::Channels{});
    t.params_of = L::params_of;
  }
  return t;
}

template <class... Ls>
const Traits& traits_of(int64_t likelihood, TypeList<Ls...>) {
  static const Traits traits[] = {traits_of<Ls>()...};
  return traits[likelihood];
}

const Traits& traits_of(const ReconstructionSpec& spec) { return traits_of(spec.likelihood, Likelihoods{}); }

// The space of a loss's elements, and how tensors are seen in it: a mixture's lie in planes along a dimension, of which
// the first stands for all.
class Sites {
 public:
  Sites(const ReconstructionInputs& in, const ReconstructionSpec& spec) : mixture_(traits_of(spec).mixture()) {
    const Tensor& recon = in.params.at(0);
    if (mixture_) {
      const auto dim = int64_t(spec.options.back());
      dim_ = dim < 0 ? dim + recon.dim() : dim;
      TORCH_CHECK_VALUE(dim_ > 0 && dim_ < recon.dim() && recon.sym_size(dim_) > 0, "vaefast: dim ", dim,
                        " of a tensor with ", recon.dim(), " dimensions");
      channels_ = traits_of(spec).channels[0] == 0 ? 0 : int(spec.options.at(spec.options.size() - 2));
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

bool no_compute(const ReconstructionInputs& in) { return in.params[0].is_meta() && in.target.is_meta(); }

struct ReconstructionOutputs {
  Tensor nll;
  Tensors grads;

  Tensors finish(const ReconstructionInputs& in, const Mask& mask) const {
    Tensors out;
    size_t next = 0;
    for (size_t k = 0; k < mask.size(); ++k) {
      if (mask[k]) out.push_back(finish_grad(grads[next++], in.params[k]));
    }
    return out;
  }
};

ReconstructionOutputs empty_grads(const ReconstructionInputs& in, const Mask& mask, const Mask& over = {}) {
  ReconstructionOutputs out;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (!mask[k]) continue;
    const Tensor& param = in.params.at(k);
    out.grads.push_back(!over.empty() && over[k] ? param : empty_grad(param, in.params[0], is_wide(in)));
  }
  return out;
}

ReconstructionOutputs empty_outputs(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask,
                                    const Mask& over) {
  ReconstructionOutputs out = empty_grads(in, mask, over);
  const Sites sites(in, spec);
  const Tensor& lead = sites.lead();
  if (is_reduced(spec.reduction)) {
    out.nll = empty_sum(lead, spec.reduction, is_wide(in));
  } else {
    auto dtype = promote(lead.scalar_type(), in.target);
    for (const Tensor& p : in.params) dtype = promote(dtype, p);
    out.nll = fresh_like(lead, dtype);
  }
  return out;
}

ReconstructionProblem reconstruction_problem(const ReconstructionInputs& in, const ReconstructionSpec& spec,
                                             const ReconstructionOutputs& out, const Mask& mask, const Sites& sites,
                                             Layout& layout) {
  ReconstructionProblem p;
  const Tensor target = sites.of_target(in.target);
  TORCH_CHECK_VALUE(in.params.size() <= kMaxParams, "vaefast: too many parameters");
  TORCH_CHECK_VALUE(target.sizes() == sites.lead().sizes(), "vaefast: recon has shape ", in.params.at(0).sizes(),
                    ", target ", in.target.sizes());
  if (sites.mixture()) sites.set_planes(p, in, traits_of(spec));
  p.likelihood = int32_t(spec.likelihood);
  std::copy(spec.options.begin(), spec.options.end(), p.options);
  p.nparams = int32_t(in.params.size());
  p.wide = is_wide(in);
  for (size_t k = 0; k < in.params.size(); ++k) layout.add(p.param[k], sites.of(in.params[k]));
  layout.add(p.target, target);
  if (in.weight) layout.add_weight(p.weight, *in.weight);
  p.grad_scale = scale_of(spec.reduction, sites.lead().sizes());
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

ReconstructionProblem forward_problem(const ReconstructionInputs& in, const ReconstructionSpec& spec,
                                      const ReconstructionOutputs& out, const Mask& mask) {
  const Sites sites(in, spec);
  Layout layout(sites.lead(), spec.reduction == Reduction::kPerSample);
  ReconstructionProblem p = reconstruction_problem(in, spec, out, mask, sites, layout);
  p.nll = true;
  if (is_reduced(spec.reduction)) {
    p.sum.out = out.nll.mutable_data_ptr();
    p.sum.scale = p.grad_scale.wide;
  } else {
    layout.add_output(p.out_nll, out.nll);
  }
  layout.finish(p.space);
  return p;
}

ReconstructionProblem backward_problem(const Tensor& upstream, const ReconstructionInputs& in,
                                       const ReconstructionSpec& spec, const ReconstructionOutputs& out,
                                       const Mask& mask) {
  const Sites sites(in, spec);
  Layout layout(sites.lead(), false);
  ReconstructionProblem p = reconstruction_problem(in, spec, out, mask, sites, layout);
  p.wide = p.wide || is_double(upstream);
  layout.add_rows(p.upstream, upstream);
  layout.finish(p.space);
  return p;
}

// kept *= upstream, for as many as one problem takes of those that share the largest one's shape; the others,
// parameters that were broadcast or a long list's, are multiplied here and now.
ReconstructionProblem rescale_problem(const Tensors& kept, const Tensor& upstream) {
  const Tensor& lead = *std::max_element(kept.begin(), kept.end(),
                                         [](const Tensor& a, const Tensor& b) { return a.numel() < b.numel(); });
  Layout layout(lead, false);
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

void check_counts(const ReconstructionInputs& in, const ReconstructionSpec& spec) {
  const Traits& traits = traits_of(spec);
  const int given = int(in.params.size()), options = int(spec.options.size());
  TORCH_CHECK_VALUE(given >= traits.required && given <= traits.params, "vaefast: ", given, " parameters, expected ",
                    traits.required, " to ", traits.params);
  TORCH_CHECK_VALUE(options == traits.options, "vaefast: ", options, " options, expected ", traits.options);
}

// One launch reads them all.
void check_devices(const ReconstructionInputs& rec, const PosteriorInputs& post) {
  TORCH_CHECK_VALUE(rec.target.device() == post.mu.device(), "vaefast: target is on ", rec.target.device(), ", mu on ",
                    post.mu.device());
}

}  // namespace

std::vector<double> PosteriorSpec::pack() const {
  return {prior_mu,
          prior_logvar,
          double(activation.kind),
          activation.lo.wide,
          activation.hi.wide,
          activation.floor.wide,
          double(int(reduction)),
          double(sample),
          double(kl),
          double(balance.has_value()),
          balance.value_or(0)};
}

PosteriorSpec PosteriorSpec::unpack(c10::ArrayRef<double> p) {
  PosteriorSpec s;
  s.prior_mu = p[0];
  s.prior_logvar = p[1];
  s.activation = make_activation(int64_t(p[2]), p[3], p[4], p[5]);
  s.reduction = Reduction(int(p[6]));
  s.sample = p[7] != 0;
  s.kl = p[8] != 0;
  if (p[9] != 0) s.balance = p[10];
  return s;
}

Activation activation_of(Name kind, double lo, double hi, double floor) {
  return make_activation(index_of<Parameterizations>(kind, "parameterization"), lo, hi, floor);
}

int64_t likelihood_of(Name name) { return index_of<Likelihoods>(name, "likelihood"); }

// A mixture of components with parameters leaves intermediate numbers where the gradients will be.
bool reads_first(const ReconstructionSpec& spec) {
  const Traits& t = traits_of(spec);
  return std::all_of(t.channels.begin(), t.channels.end(), [&](int c) { return t.params_of(c) == 0; });
}

bool keeps_gradients(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask) {
  if (spec.reduction == Reduction::kNone) return false;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (!mask[k]) continue;
    // float16: the unscaled gradient of a mean underflows before a loss scaler's factor reaches it
    if (in.params[k].scalar_type() == at::kHalf) return false;
    // a gradient summed over the batch can no longer be multiplied per sample
    if (spec.reduction == Reduction::kPerSample && in.params[k].sym_sizes() != in.params[0].sym_sizes()) return false;
  }
  return true;
}

Tensors reconstruction_forward(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask,
                               const Mask& over) {
  check_counts(in, spec);
  const ReconstructionOutputs out = empty_outputs(in, spec, mask, over);
  if (!no_compute(in)) {
    ReconstructionProblem p = forward_problem(in, spec, out, mask);
    Job job;
    job.reconstruction = &p;
    run(in.target, job);
  }
  Tensors result = out.finish(in, mask);
  result.insert(result.begin(), out.nll);
  return result;
}

Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const ReconstructionSpec& spec,
                                const Mask& mask) {
  check_counts(in, spec);
  const ReconstructionOutputs out = empty_grads(in, mask);
  if (!no_compute(in)) {
    ReconstructionProblem p = backward_problem(upstream, in, spec, out, mask);
    Job job;
    job.reconstruction = &p;
    run(in.target, job);
  }
  return out.finish(in, mask);
}

Tensors elbo_forward(const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                     const PosteriorSpec& post_spec, double beta, const Mask& mask, const Mask& post_mask,
                     const Mask& over) {
  check_counts(rec, rec_spec);
  check_devices(rec, post);
  const Reduction r = rec_spec.reduction;
  TORCH_CHECK_VALUE(r == Reduction::kPerSample || r == Reduction::kBatchMean || r == Reduction::kSum,
                    "vaefast: an ELBO's terms have different elements; they add up per sample");
  ReconstructionOutputs rec_out = empty_outputs(rec, rec_spec, mask, over);
  PosteriorOutputs post_out = empty_outputs(post, post_spec);
  const bool wide = is_wide(rec) || is_wide(post);
  if (is_wide(rec) != is_wide(post)) {
    // one loss, one dtype: the narrower side is summed in the wider type
    rec_out.nll = empty_sum(rec.target, rec_spec.reduction, wide);
    post_out.kl = empty_sum(post.mu, post_spec.reduction, wide);
  }
  const Tensor total = fresh_like(rec_out.nll);
  const MaybeTensor none;
  c10::optional<PosteriorGradients> grads;
  if (!post_mask.empty()) grads.emplace(none, none, post, post_spec, post_mask);
  if (!no_compute(post.mu)) {
    TORCH_CHECK_VALUE(r == Reduction::kSum || rec.target.sizes()[0] == post.mu.sizes()[0], "vaefast: batches differ");
    ReconstructionProblem reconstruction = forward_problem(rec, rec_spec, rec_out, mask);
    PosteriorProblem posterior = grads ? grads->problem(beta, post_out.kl) : forward_problem(post, post_spec, post_out);
    reconstruction.wide = posterior.wide = wide;
    Job job;
    job.posterior = &posterior;
    job.reconstruction = &reconstruction;
    job.total = total.mutable_data_ptr();
    job.beta = beta;
    run(post.mu, job);
  }
  Tensors result = rec_out.finish(rec, mask);
  result.insert(result.begin(), {total, rec_out.nll, post_out.kl});
  if (grads) {
    for (Tensor& g : grads->finish()) result.push_back(std::move(g));
  }
  return result;
}

Tensors elbo_backward_(const Tensors& kept, const MaybeTensor& dnll, const MaybeTensor& dkl, double beta,
                       const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                       const PosteriorSpec& post_spec, const Mask& mask, const Mask& post_mask) {
  check_counts(rec, rec_spec);
  check_devices(rec, post);
  const bool recompute = dnll && kept.empty();
  const ReconstructionOutputs out = recompute ? empty_grads(rec, mask) : ReconstructionOutputs();
  const MaybeTensor no_sample;
  c10::optional<PosteriorGradients> grads;
  PosteriorSpec kl_spec = post_spec;
  kl_spec.sample = false;
  if (dkl) grads.emplace(no_sample, dkl, post, kl_spec, post_mask);
  if (!no_compute(post.mu)) {
    ReconstructionProblem r;
    PosteriorProblem p;
    Job job;
    if (dnll) {
      r = recompute ? backward_problem(*dnll, rec, rec_spec, out, mask) : rescale_problem(kept, *dnll);
      if (recompute || !is_one(*dnll)) job.reconstruction = &r;
    }
    if (dkl) {
      p = grads->problem(beta);
      job.posterior = &p;
    }
    r.wide = p.wide = (job.reconstruction && r.wide) || (dkl && p.wide);
    if (job.reconstruction || job.posterior) run(post.mu, job);
  }
  Tensors result = recompute ? out.finish(rec, mask) : Tensors();
  if (grads) {
    for (Tensor& g : grads->finish()) result.push_back(std::move(g));
  }
  return result;
}

bool is_one(const Tensor& t) {
  if (t.numel() != 1 || !device_for(t.device().type()).synchronous) return false;
  return t.scalar_type() == at::kDouble  ? *t.const_data_ptr<double>() == 1
         : t.scalar_type() == at::kFloat ? *t.const_data_ptr<float>() == 1
                                         : false;
}

Tensor by_rows(const Tensor& t, int64_t dim) {
  Tensor view = t;
  while (view.dim() > 0 && view.dim() < dim) view = view.unsqueeze(-1);
  return view;
}

void scale_(const Tensors& kept, const Tensor& upstream) {
  if (kept.empty() || no_compute(kept[0])) return;
  for (const Tensor& grad : kept) dtype_of(grad);
  if (is_one(upstream)) return;
  ReconstructionProblem p = rescale_problem(kept, upstream);
  Job job;
  job.reconstruction = &p;
  run(kept[0], job);
}

}  // namespace vaefast
