// A posterior whose mean and log variance lie in one tensor: the posterior's operator on views of it, and its gradients
// written into views of one tensor like it.

#include <cmath>
#include <utility>

#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

// Mean and log variance.
std::pair<Tensor, Tensor> halves(const Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(dim >= 0 && dim < t.dim() && t.sym_size(dim) % 2 == 0, "vaefast: moments of shape ", t.sym_sizes(),
                    " have no halves along dimension ", dim);
  const c10::SymInt n = t.sym_size(dim) / 2;
  return {t.narrow_symint(dim, 0, n), t.narrow_symint(dim, n, n)};
}

bool clamps_prior(const PackedInputs& in) { return std::isfinite(in.prior_lo) || std::isfinite(in.prior_hi); }

// The kernels clamp the posterior's log variance; the prior's comes to them clamped, in a tensor of its own.
PosteriorInputs unpacked(const PackedInputs& in) {
  PosteriorInputs out;
  std::tie(out.mu, out.raw) = halves(in.moments, in.dim);
  if (!in.prior) return out;
  TORCH_CHECK_VALUE(in.prior->sym_sizes() == in.moments.sym_sizes(), "vaefast: moments have shape ",
                    in.moments.sym_sizes(), ", the prior's ", in.prior->sym_sizes());
  const auto [prior_mu, prior_raw] = halves(*in.prior, in.dim);
  out.prior_mu = prior_mu;
  out.prior_logvar = clamps_prior(in) ? prior_raw.clamp(in.prior_lo, in.prior_hi) : prior_raw;
  return out;
}

}  // namespace

Tensors packed_forward(const PackedInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                       const PosteriorSpec& spec, const Asked& asked) {
  return posterior_forward(unpacked(in), {c10::nullopt, seed}, generator, spec, asked);
}

Tensors packed_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PackedInputs& in, const MaybeTensor& seed,
                        const PosteriorSpec& spec, const Mask& mask) {
  TORCH_CHECK_VALUE(mask.size() == 2 && (in.prior || !mask[1]), "vaefast: the mask has two entries, moments and prior");
  Tensors grads;
  Places places;
  for (size_t k = 0; k < 2; ++k) {
    if (!mask[k]) continue;
    grads.push_back(fresh_like(k == 0 ? in.moments : *in.prior));
    std::tie(places[2 * k], places[2 * k + 1]) = halves(grads.back(), in.dim);
  }
  posterior_backward_into(places, dz, dkl, unpacked(in), {c10::nullopt, seed}, spec,
                          {mask[0], mask[0], mask[1], mask[1]});
  if (mask[1] && clamps_prior(in)) {
    const Tensor raw = halves(*in.prior, in.dim).second;
    places[3].masked_fill_(raw.le(in.prior_lo).logical_or_(raw.ge(in.prior_hi)), 0);
  }
  return grads;
}

}  // namespace vaefast
