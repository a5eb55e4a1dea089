// The nodes of draws: their log density ratios, and the importance-weighted bound that they and a reconstruction make.

#include <ATen/TensorOperators.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>

#include <cmath>
#include <utility>

#include "autograd/entries.h"
#include "autograd/reconstruction.h"

namespace vaefast {

namespace {

struct LogRatioNode : torch::autograd::Function<LogRatioNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                        const MaybeTensor&, const LogRatioInputs& in) {
    Archive().put(in).keep(ctx);
    return below<log_ratio_forward>(in);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto in = Archived(ctx).take<LogRatioInputs>();
    Edges edges(ctx);
    Mask mask(5, 0);
    for (int k = 0; k < 3; ++k) mask[k] = edges.next();
    mask[3] = edges.next(in.prior_mu.has_value());
    mask[4] = edges.next(in.prior_logvar.has_value());
    variable_list grads(6);
    if (any(mask)) spread(grads, 0, mask, differentiable<log_ratio_backward>(upstream[0], in, mask));
    return grads;
  }
};

const Reduced kRows{Reduction::kPerDraw};

// As an operator above autograd has it, so that it can be differentiated.
Tensor log_weights_of(const Tensor& ratio, const ReconstructionInputs& in) {
  return ratio - reconstruction(in, kRows, false);
}

struct BoundNode : torch::autograd::Function<BoundNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList, const Tensor& ratio,
                               const ReconstructionInputs& in, const Reduced& reduced, const Mask& wanted,
                               Overwrite overwrite) {
    Mask mask = wanted;
    mask.push_back(1);
    const Tensors out = below<bound_forward>(ratio, in, reduced, mask);
    Archive archive;
    archive.put(ratio).put(reduced).put(out[2]);
    SavedReconstruction::put(archive, in, kRows, overwrite, wanted, Tensors(out.begin() + 3, out.end()), Mask());
    archive.keep(ctx);
    ctx->mark_non_differentiable({out[1]});
    return {out[0], out[1]};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived archived(ctx);
    const auto ratio = archived.take<Tensor>();
    const auto reduced = archived.take<Reduced>();
    auto share = archived.take<Tensor>();
    const SavedReconstruction saved(archived);
    Edges edges(ctx);
    const Mask mask = edges.next(saved.in.params);
    const bool of_ratio = edges.next();
    const size_t params = mask.size();
    variable_list grads(params + 5);
    // of each sample or of all, for all draws
    const Tensor row = upstream[0].dim() ? upstream[0].unsqueeze(0) : upstream[0];
    if (at::GradMode::is_enabled()) {
      share = at::softmax(log_weights_of(ratio, saved.in), 0) * (row * scale_of_bound(reduced, ratio.size(1)));
      if (any(mask)) {
        spread(grads, 0, mask, differentiable<reconstruction_backward>(share, saved.in, kRows, mask));
      }
    } else {
      const variable_list last{upstream[0]};
      spread(grads, 0, mask, rescaled(kept_for(mask, saved.kept, saved.wanted), row, saved.final(last)));
      if (of_ratio) share = share * row;
    }
    if (of_ratio) grads[params] = (-share).to(ratio.scalar_type());
    return grads;
  }
};

Tensors recorded_bound(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced,
                       Overwrite overwrite) {
  check_no_grad(in);
  const Mask wanted = wanted_grads(in.params);
  if (any(wanted) && !keeps_gradients(in, kRows, wanted)) {
    const Tensor log_weights = log_weights_of(ratio, in);
    const Tensor losses = std::log(double(ratio.size(0))) - at::logsumexp(log_weights, 0);
    const Tensor loss = reduced.kind == Reduction::kPerSample ? losses
                        : reduced.kind == Reduction::kSum     ? losses.sum()
                                                              : losses.mean();
    return {loss, log_weights.detach()};
  }
  if (any(wanted) || (at::GradMode::is_enabled() && wants_grad(ratio))) {
    return BoundNode::apply(at::TensorList(in.params), ratio, in, reduced, wanted, overwrite);
  }
  return below<bound_forward>(ratio, in, reduced, Mask(in.params.size() + 1, 0));
}

}  // namespace

Tensor log_ratio(const LogRatioInputs& in) {
  if (at::GradMode::is_enabled() && (wants_grad(in.z) || wants_grad(in.mu) || wants_grad(in.logvar) ||
                                     wants_grad(in.prior_mu) || wants_grad(in.prior_logvar))) {
    return LogRatioNode::apply(in.z, in.mu, in.logvar, in.prior_mu, in.prior_logvar, in);
  }
  return below<log_ratio_forward>(in);
}

Tensors bound(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced) {
  return recorded_bound(ratio, in, reduced, Overwrite::kNothing);
}

Tensors eager::bound(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced) {
  return recorded_bound(ratio, in, reduced, Overwrite::kKept);
}

}  // namespace vaefast
