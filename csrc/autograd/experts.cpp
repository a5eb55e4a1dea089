// The node of a product of experts.

#include <utility>

#include "autograd/archive.h"
#include "autograd/entries.h"
#include "autograd/node.h"
#include "operators/operators.h"

namespace vaefast {

namespace {

struct ExpertsNode : torch::autograd::Function<ExpertsNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor&, const Tensor&, const ExpertsInputs& in) {
    Archive().put(in).keep(ctx);
    ctx->set_materialize_grads(false);
    return below<experts_forward>(in);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto in = Archived(ctx).take<ExpertsInputs>();
    Edges edges(ctx);
    Mask mask(2, 0);
    for (int64_t& each : mask) each = edges.next();
    variable_list grads(3);
    const MaybeTensor dmu = maybe(upstream[0]), dlogvar = maybe(upstream[1]);
    if (dmu || dlogvar) spread(grads, 0, mask, differentiable<experts_backward>(dmu, dlogvar, in, mask));
    return grads;
  }
};

}  // namespace

Tensors experts(const ExpertsInputs& in) {
  if (at::GradMode::is_enabled() && (wants_grad(in.mus) || wants_grad(in.logvars))) {
    return ExpertsNode::apply(in.mus, in.logvars, in);
  }
  return below<experts_forward>(in);
}

}  // namespace vaefast
