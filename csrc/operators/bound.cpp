// The importance-weighted bound of a reconstruction's draws.

#include <ATen/ops/empty.h>

#include <algorithm>

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"
#include "operators/reconstruction_problem.h"

namespace vaefast {

double scale_of_bound(const Reduced& reduced, int64_t samples) {
  TORCH_CHECK_VALUE(
      reduced.kind == Reduction::kPerSample || reduced.kind == Reduction::kBatchMean || reduced.kind == Reduction::kSum,
      "vaefast: a bound is reduced to one a sample, their mean or their sum");
  return reduced.kind == Reduction::kBatchMean ? 1.0 / double(samples) : 1.0;
}

Tensors bound_forward(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask) {
  check_counts(in);
  const Reduced rows{Reduction::kPerDraw};
  const size_t params = in.params.size();
  TORCH_CHECK_VALUE(mask.size() == params + 1, "vaefast: the mask has an entry for each parameter and the ratio");
  const Mask of_params(mask.begin(), mask.begin() + params);
  const bool grads = std::any_of(of_params.begin(), of_params.end(), [](int64_t m) { return m; });
  TORCH_CHECK_VALUE(!grads || keeps_gradients(in, rows, of_params), "vaefast: a bound keeps no such gradients");
  const Tensor& recon = in.params[0];
  TORCH_CHECK_VALUE(ratio.dim() == 2 && recon.dim() >= 2 && ratio.sym_sizes() == recon.sym_sizes().slice(0, 2),
                    "vaefast: ratios of shape ", ratio.sym_sizes(), " for recon of ", recon.sym_sizes());

  const bool wide = is_wide(in) || is_double(ratio);
  const auto options = recon.options().dtype(wide ? at::kDouble : at::kFloat);
  const bool sum = reduced.kind != Reduction::kPerSample;
  const Tensor loss = at::empty_symint(sum ? c10::SymIntArrayRef() : ratio.sym_sizes().slice(1), options);
  const Tensor log_weights = at::empty_symint(ratio.sym_sizes(), options);
  const Tensor share = grads || mask.back() ? at::empty_symint(ratio.sym_sizes(), options) : Tensor();
  ReconstructionOutputs out = empty_grads(in, of_params);
  Tensors found{loss, log_weights};
  if (share.defined()) found.push_back(share);
  found.insert(found.end(), out.grads.begin(), out.grads.end());
  if (no_compute(in)) return found;

  TORCH_CHECK_VALUE(ratio.device() == recon.device() && (is_double(ratio) || ratio.scalar_type() == at::kFloat),
                    "vaefast: ratios are float32 or float64 and lie where recon does, got ", ratio.scalar_type());
  out.nll = log_weights;
  ReconstructionProblem p = forward_problem(in, rows, out, of_params), rescale;
  const Tensor dense = ratio.contiguous();
  BoundProblem bound;
  bound.draws = ratio.size(0), bound.samples = ratio.size(1);
  bound.wide = wide, bound.sum = sum;
  bound.scale = scale_of_bound(reduced, bound.samples);
  bound.ratio = dense.const_data_ptr();
  bound.ratio_wide = is_double(dense);
  bound.loss = loss.mutable_data_ptr();
  bound.log_weights = log_weights.mutable_data_ptr();
  bound.reconstruction = &p;
  if (share.defined()) bound.share = share.mutable_data_ptr();
  if (grads) {
    rescale = rescale_problem(out.grads, share, 2);
    bound.rescale = &rescale;
  }
  const auto on_device = device_for(recon.device().type()).bound;
  TORCH_CHECK_VALUE(on_device, "vaefast: there is no kernel for bounds of ", recon.device(), " tensors");
  on_device(bound);
  return found;
}

}  // namespace vaefast
