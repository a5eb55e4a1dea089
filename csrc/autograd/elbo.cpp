// The node of an ELBO.

#include <ATen/TensorOperators.h>

#include <algorithm>
#include <utility>

#include "autograd/entries.h"
#include "autograd/overwrite.h"
#include "autograd/reconstruction.h"
#include "device.h"

namespace vaefast {

namespace {

// What reaches a term of the loss: a comes down from the loss, in which the term has a factor, b from the term itself.
// Where nothing does, or no input of the term wants a gradient, grad is undefined and the mask empty.
struct Upstream {
  Tensor grad;
  double factor = 1.0;  // still to be multiplied by

  Upstream(const Tensor& a, const Tensor& b, double beta, Mask& mask) {
    if (!any(mask)) return;
    if (a.defined() && b.defined()) {
      grad = (beta == 1.0 ? a : a * beta) + b;
    } else if (a.defined()) {
      grad = a;
      factor = beta;
    } else {
      grad = b;
    }
    if (!grad.defined()) mask.assign(mask.size(), 0);
  }
};

// Latents so few that a launch for their gradients alone takes longer than the arithmetic.
constexpr int64_t kFewLatents = 16384;

// The posterior's gradients that an ELBO's forward writes for backward to find: on a device that computes them with the
// KL, in float32 or float64, of few latents; of a number that is not known while traced there are many.
Mask kept_mask(const PosteriorInputs& in) {
  const Tensor given[] = {in.mu, in.raw, in.prior_mu.value_or(in.mu), in.prior_logvar.value_or(in.raw)};
  const bool fits = std::all_of(std::begin(given), std::end(given), [&](const Tensor& t) {
    return (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble) && t.sym_sizes() == in.mu.sym_sizes();
  });
  const auto latents = in.mu.sym_numel().maybe_as_int();
  if (!fits || !device_for(in.mu.device().type()).both || !latents || *latents > kFewLatents) return {};
  const Mask mask{wants_grad(in.mu), wants_grad(in.raw), wants_grad(in.prior_mu), wants_grad(in.prior_logvar)};
  return any(mask) ? mask : Mask();
}

struct ElboNode : torch::autograd::Function<ElboNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList, const Tensor&, const Tensor&, const MaybeTensor&,
                               const MaybeTensor&, const ReconstructionInputs& rec, const PosteriorInputs& post,
                               const PosteriorSpec& spec, double beta, const Mask& wanted, Overwrite overwrite,
                               bool loss_alone) {
    const Mask kept = vaefast::kept_mask(rec, spec.reduced, wanted), post_wanted = kept_mask(post);
    Mask over;
    if (overwrite == Overwrite::kParams) {
      over = overwritable(rec, kept, {post.mu, post.raw, post.prior_mu, post.prior_logvar});
    }
    Tensors out = any(over) ? elbo_forward_over(over, rec, post, spec, beta, kept, post_wanted)
                            : below<elbo_forward>(rec, post, spec, beta, kept, post_wanted);
    const auto post_kept = out.end() - count(post_wanted);
    Archive archive;
    SavedReconstruction::put(archive, rec, spec.reduced, overwrite, wanted, Tensors(out.begin() + 3, post_kept), over);
    archive.put(post).put(spec).put(beta).put(post_wanted).put(Tensors(post_kept, out.end())).keep(ctx);
    ctx->set_materialize_grads(false);
    out.resize(loss_alone ? 1 : 3);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    upstream.resize(3);
    Archived saved(ctx);
    const SavedReconstruction rec(saved);
    const auto post = saved.take<PosteriorInputs>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto beta = saved.take<double>();
    const auto post_wanted = saved.take<Mask>();
    const auto post_kept = saved.take<Tensors>();
    Edges edges(ctx);
    Mask mask = edges.next(rec.in.params);
    Mask post_mask = edges.next(post);
    const size_t params = mask.size();
    variable_list grads(params + 11);
    const Upstream dnll(upstream[0], upstream[1], 1.0, mask);
    const Upstream dkl(upstream[0], upstream[2], beta, post_mask);
    if (!any(mask) && !any(post_mask)) return grads;
    // where all comes down from the loss, so do the gradients that forward kept of it
    const bool loss_alone = upstream[0].defined() && !upstream[1].defined() && !upstream[2].defined();
    const bool kept = loss_alone && !post_kept.empty();
    if (rec.final(upstream)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      Tensors all = kept_for(mask, rec.kept, rec.wanted);
      if (kept && all.size() == size_t(count(mask))) {
        for (Tensor& g : kept_for(post_mask, post_kept, post_wanted)) all.push_back(std::move(g));
        if (!is_one(upstream[0])) dispatched<scale_>(Written{all}, upstream[0]);
      } else {
        const Tensors out = dispatched<elbo_backward_>(Written{all}, maybe(dnll.grad), maybe(dkl.grad), dkl.factor,
                                                       rec.in, post, spec, mask, post_mask);
        all.insert(all.end(), out.begin(), out.end());
      }
      spread(grads, 0, mask, Tensors(all.begin(), all.begin() + count(mask)));
      spread(grads, params, post_mask, Tensors(all.begin() + count(mask), all.end()));
      return grads;
    }
    if (any(mask)) spread(grads, 0, mask, rec.backward(dnll.grad, mask));
    if (any(post_mask) && kept && !at::GradMode::is_enabled()) {
      spread(grads, params, post_mask, rescaled(kept_for(post_mask, post_kept, post_wanted), upstream[0], false));
    } else if (any(post_mask)) {
      const MaybeTensor none, scaled = dkl.factor == 1.0 ? dkl.grad : dkl.grad * dkl.factor;
      spread(grads, params, post_mask,
             differentiable<posterior_backward>(none, scaled, post, Noise(), spec, post_mask));
    }
    return grads;
  }
};

// loss, nll, kl; or the first alone.
Tensors recorded_elbo(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                      double beta, Overwrite overwrite, bool loss_alone) {
  check_no_grad(rec);
  const Mask wanted = wanted_grads(rec.params);
  if (!any(wanted) && !wants_grad(post)) return below<elbo_forward>(rec, post, spec, beta, wanted, Mask());
  return ElboNode::apply(at::TensorList(rec.params), post.mu, post.raw, post.prior_mu, post.prior_logvar, rec, post,
                         spec, beta, wanted, overwrite, loss_alone);
}

Terms terms(const Tensors& out) { return {out[0], out[1], out[2]}; }

Overwrite overwrite_of(bool recon) { return recon ? Overwrite::kParams : Overwrite::kKept; }

}  // namespace

Terms elbo(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec, double beta, bool) {
  return terms(recorded_elbo(rec, post, spec, beta, Overwrite::kNothing, false));
}

Terms eager::elbo(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec, double beta,
                  bool overwrite_recon) {
  return terms(recorded_elbo(rec, post, spec, beta, overwrite_of(overwrite_recon), false));
}

Tensor eager::elbo_loss(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                        double beta, bool overwrite_recon) {
  return recorded_elbo(rec, post, spec, beta, overwrite_of(overwrite_recon), true)[0];
}

}  // namespace vaefast
