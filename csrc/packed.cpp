// A posterior whose mean and log variance lie in one tensor: the posterior's operator on views of it, and its gradients
// written into views of one tensor like it.

#include <ATen/ATen.h>

#include <array>
#include <cmath>

#include "posterior_op.h"
#include "results.h"

namespace vaefast {

namespace {

// Mean and log variance.
std::array<Tensor, 2> halves(const Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(dim >= 0 && dim < t.dim() && t.sym_size(dim) % 2 == 0, "vaefast: moments of shape ", t.sym_sizes(),
                    " have no halves along dimension ", dim);
  const c10::SymInt n = t.sym_size(dim) / 2;
  return {t.narrow_symint(dim, 0, n), t.narrow_symint(dim, n, n)};
}

bool clamps_prior(const PackedSpec& spec) { return std::isfinite(spec.prior_lo) || std::isfinite(spec.prior_hi); }

// The kernels clamp the posterior's log variance; the prior's comes to them clamped, in a tensor of its own.
PosteriorInputs unpacked(const PackedInputs& in, const PackedSpec& spec) {
  const auto [mu, raw] = halves(in.moments, spec.dim);
  PosteriorInputs out{mu, raw, c10::nullopt, c10::nullopt, c10::nullopt, in.seed, in.generator};
  if (!in.prior) return out;
  TORCH_CHECK_VALUE(in.prior->sym_sizes() == in.moments.sym_sizes(), "vaefast: moments have shape ",
                    in.moments.sym_sizes(), ", the prior's ", in.prior->sym_sizes());
  const auto [prior_mu, prior_raw] = halves(*in.prior, spec.dim);
  out.prior_mu = prior_mu;
  out.prior_logvar = clamps_prior(spec) ? prior_raw.clamp(spec.prior_lo, spec.prior_hi) : prior_raw;
  return out;
}

}  // namespace

std::vector<double> PackedSpec::pack() const {
  std::vector<double> packed = posterior.pack();
  packed.insert(packed.end(), {double(dim), prior_lo, prior_hi});
  return packed;
}

PackedSpec PackedSpec::unpack(c10::ArrayRef<double> packed) {
  const auto own = packed.slice(packed.size() - 3);
  return {PosteriorSpec::unpack(packed), int64_t(own[0]), own[1], own[2]};
}

Tensors packed_forward(const PackedInputs& in, const PackedSpec& spec) {
  return posterior_forward(unpacked(in, spec), spec.posterior);
}

Tensors packed_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PackedInputs& in, const PackedSpec& spec,
                        const Mask& mask) {
  TORCH_CHECK_VALUE(mask.size() == 2 && (in.prior || !mask[1]), "vaefast: the mask has two entries, moments and prior");
  Tensors grads;
  Places places;
  for (size_t k = 0; k < 2; ++k) {
    if (!mask[k]) continue;
    grads.push_back(fresh_like(k == 0 ? in.moments : *in.prior));
    const auto [first, second] = halves(grads.back(), spec.dim);
    places[2 * k] = first;
    places[2 * k + 1] = second;
  }
  posterior_backward(dz, dkl, unpacked(in, spec), spec.posterior, {mask[0], mask[0], mask[1], mask[1]}, places);
  if (mask[1] && clamps_prior(spec)) {
    const Tensor raw = halves(*in.prior, spec.dim)[1];
    places[3].masked_fill_(raw.le(spec.prior_lo).logical_or_(raw.ge(spec.prior_hi)), 0);
  }
  return grads;
}

}  // namespace vaefast
