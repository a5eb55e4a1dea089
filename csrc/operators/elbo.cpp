// An ELBO's operators: a reconstruction and a KL in one job.

#include <utility>

#include "operators/operators.h"
#include "operators/outputs.h"
#include "operators/posterior_problem.h"
#include "operators/reconstruction_problem.h"

namespace vaefast {

namespace {

constexpr Asked kKlAlone{false, true};

// One launch reads them all.
void check_devices(const ReconstructionInputs& rec, const PosteriorInputs& post) {
  TORCH_CHECK_VALUE(rec.target.device() == post.mu.device(), "vaefast: target is on ", rec.target.device(), ", mu on ",
                    post.mu.device());
}

}  // namespace

Tensors elbo_forward(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                     double beta, const Mask& mask, const Mask& post_mask) {
  return elbo_forward_over({}, rec, post, spec, beta, mask, post_mask);
}

Tensors elbo_forward_over(const Mask& over, const ReconstructionInputs& rec, const PosteriorInputs& post,
                          const PosteriorSpec& spec, double beta, const Mask& mask, const Mask& post_mask) {
  check_counts(rec);
  check_devices(rec, post);
  const Reduced& reduced = spec.reduced;
  const Reduction r = reduced.kind;
  const PosteriorCall call{post, Noise(), spec, kKlAlone};
  TORCH_CHECK_VALUE(r == Reduction::kPerSample || r == Reduction::kBatchMean || r == Reduction::kSum,
                    "vaefast: an ELBO's terms have different elements; they add up per sample");
  ReconstructionOutputs rec_out = empty_outputs(rec, reduced, mask, over);
  PosteriorOutputs post_out = empty_outputs(call);
  const bool wide = is_wide(rec) || is_wide(call);
  if (is_wide(rec) != is_wide(call)) {
    // one loss, one dtype: the narrower side is summed in the wider type
    rec_out.nll = empty_sum(rec.target, reduced, wide);
    post_out.kl = empty_sum(post.mu, reduced, wide);
  }
  const Tensor total = fresh_like(rec_out.nll);
  const MaybeTensor none;
  c10::optional<PosteriorGradients> grads;
  if (!post_mask.empty()) grads.emplace(none, none, call, post_mask);
  if (!no_compute(post.mu)) {
    TORCH_CHECK_VALUE(r == Reduction::kSum || rec.target.sizes()[0] == post.mu.sizes()[0], "vaefast: batches differ");
    ReconstructionProblem reconstruction = forward_problem(rec, reduced, rec_out, mask);
    PosteriorProblem posterior = grads ? grads->problem(beta, post_out.kl) : forward_problem(call, post_out);
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

Tensors elbo_backward_(const Written& written, const MaybeTensor& dnll, const MaybeTensor& dkl, double beta,
                       const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                       const Mask& mask, const Mask& post_mask) {
  const Tensors& kept = written.list;
  check_counts(rec);
  check_devices(rec, post);
  const bool recompute = dnll && kept.empty();
  const ReconstructionOutputs out = recompute ? empty_grads(rec, mask) : ReconstructionOutputs();
  const MaybeTensor no_sample;
  c10::optional<PosteriorGradients> grads;
  const PosteriorCall call{post, Noise(), spec, kKlAlone};
  if (dkl) grads.emplace(no_sample, dkl, call, post_mask);
  if (!no_compute(post.mu)) {
    ReconstructionProblem r;
    PosteriorProblem p;
    Job job;
    if (dnll) {
      r = recompute ? backward_problem(*dnll, rec, spec.reduced, out, mask) : rescale_problem(kept, *dnll);
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

}  // namespace vaefast
