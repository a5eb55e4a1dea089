// The node of categorical latents.

#include <utility>

#include "autograd/archive.h"
#include "autograd/entries.h"
#include "autograd/node.h"
#include "operators/operators.h"

namespace vaefast {

namespace {

struct CategoricalNode : torch::autograd::Function<CategoricalNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor&, const MaybeTensor&, const MaybeTensor& uniforms,
                               const CategoricalInputs& in, bool kl) {
    Archive().put(in).put(uniforms.has_value()).put(kl).keep(ctx);
    ctx->set_materialize_grads(false);
    return below<categorical_forward>(uniforms, in, kl);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<CategoricalInputs>();
    const bool sample = saved.take<bool>(), kl = saved.take<bool>();
    Edges edges(ctx);
    Mask mask(2, 0);
    mask[0] = edges.next();
    mask[1] = edges.next(in.prior.has_value());
    variable_list grads(5);
    const auto [dz, dkl] = upstream_of(upstream, {sample, kl});
    if (dz || dkl) spread(grads, 0, mask, differentiable<categorical_backward>(dz, dkl, in, mask));
    return grads;
  }
};

}  // namespace

Tensors categorical(const MaybeTensor& uniforms, const CategoricalInputs& in, bool kl) {
  if (at::GradMode::is_enabled() && (wants_grad(in.logits) || wants_grad(in.prior))) {
    return CategoricalNode::apply(in.logits, in.prior, uniforms, in, kl);
  }
  return below<categorical_forward>(uniforms, in, kl);
}

}  // namespace vaefast
