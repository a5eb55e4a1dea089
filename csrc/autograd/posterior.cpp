// The nodes of a posterior: sampling, the KL, or both.

#include <cmath>
#include <utility>

#include "autograd/archive.h"
#include "autograd/entries.h"
#include "autograd/node.h"
#include "operators/operators.h"

namespace vaefast {

namespace {

// Whether the standard deviation is raw itself, whose gradient needs nothing of it.
bool is_identity(const Parameterization& p) {
  static const auto kStd = named<ParameterizationIndex>("std");
  return p.kind == kStd && std::isinf(p.lo) && std::isinf(p.hi);
}

struct PosteriorNode : torch::autograd::Function<PosteriorNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor&, const Tensor&, const MaybeTensor&,
                               const MaybeTensor&, const PosteriorInputs& in, Noise noise,
                               const MaybeGenerator& generator, const PosteriorSpec& spec, const Asked& asked) {
    Tensors out = below<posterior_forward>(in, noise, generator, spec, asked);
    take_seed(out, noise.seed, asked);
    PosteriorInputs read = in;
    if (!asked.kl) read.mu = shape_alone(in.mu);
    if (!asked.kl && is_identity(spec.parameterization)) read.raw = shape_alone(in.raw);
    Archive().put(read).put(noise).put(spec).put(asked).keep(ctx);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<PosteriorInputs>();
    const auto noise = saved.take<Noise>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto asked = saved.take<Asked>();
    const Mask mask = Edges(ctx).next(in);
    variable_list grads(9);
    const auto [dz, dkl] = upstream_of(upstream, asked);
    if (dz || dkl) spread(grads, 0, mask, differentiable<posterior_backward>(dz, dkl, in, noise, spec, mask));
    return grads;
  }
};

struct PackedNode : torch::autograd::Function<PackedNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor&, const MaybeTensor&, const PackedInputs& in,
                               MaybeTensor seed, const MaybeGenerator& generator, const PosteriorSpec& spec,
                               const Asked& asked) {
    Tensors out = below<packed_forward>(in, seed, generator, spec, asked);
    take_seed(out, seed, asked);
    Archive().put(in).put(seed).put(spec).put(asked).keep(ctx);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<PackedInputs>();
    const auto seed = saved.take<MaybeTensor>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto asked = saved.take<Asked>();
    Edges edges(ctx);
    Mask mask(2, 0);
    mask[0] = edges.next();
    mask[1] = edges.next(in.prior.has_value());
    variable_list grads(7);
    const auto [dz, dkl] = upstream_of(upstream, asked);
    if (dz || dkl) spread(grads, 0, mask, differentiable<packed_backward>(dz, dkl, in, seed, spec, mask));
    return grads;
  }
};

}  // namespace

Tensors posterior(const PosteriorInputs& in, const Noise& noise, const MaybeGenerator& generator,
                  const PosteriorSpec& spec, const Asked& asked) {
  if (wants_grad(in)) {
    return PosteriorNode::apply(in.mu, in.raw, in.prior_mu, in.prior_logvar, in, noise, generator, spec, asked);
  }
  Tensors out = below<posterior_forward>(in, noise, generator, spec, asked);
  out.resize(asked.outputs());
  return out;
}

Tensors packed_posterior(const PackedInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                         const PosteriorSpec& spec, const Asked& asked) {
  if (at::GradMode::is_enabled() && (wants_grad(in.moments) || wants_grad(in.prior))) {
    return PackedNode::apply(in.moments, in.prior, in, seed, generator, spec, asked);
  }
  Tensors out = below<packed_forward>(in, seed, generator, spec, asked);
  out.resize(asked.outputs());
  return out;
}

}  // namespace vaefast
