// A reconstruction's operator, and what multiplies the gradients that it kept.

#include "device.h"
#include "operators/layout.h"
#include "operators/operators.h"
#include "operators/outputs.h"
#include "operators/reconstruction_problem.h"

namespace vaefast {

bool keeps_gradients(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask) {
  if (reduced.kind == Reduction::kNone) return false;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (!mask[k]) continue;
    // float16: the unscaled gradient of a mean underflows before a loss scaler's factor reaches it
    if (in.params[k].scalar_type() == at::kHalf) return false;
    // a gradient summed over the batch can no longer be multiplied per sample
    if (batch_dims_of(reduced) && in.params[k].sym_sizes() != in.params[0].sym_sizes()) return false;
  }
  return true;
}

Tensors reconstruction_forward(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask) {
  return reconstruction_forward_over({}, in, reduced, mask);
}

Tensors reconstruction_forward_over(const Mask& over, const ReconstructionInputs& in, const Reduced& reduced,
                                    const Mask& mask) {
  check_counts(in);
  const ReconstructionOutputs out = empty_outputs(in, reduced, mask, over);
  if (!no_compute(in)) {
    ReconstructionProblem p = forward_problem(in, reduced, out, mask);
    Job job;
    job.reconstruction = &p;
    run(in.target, job);
  }
  Tensors result = out.finish(in, mask);
  result.insert(result.begin(), out.nll);
  return result;
}

Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const Reduced& reduced,
                                const Mask& mask) {
  check_counts(in);
  const ReconstructionOutputs out = empty_grads(in, mask);
  if (!no_compute(in)) {
    ReconstructionProblem p = backward_problem(upstream, in, reduced, out, mask);
    Job job;
    job.reconstruction = &p;
    run(in.target, job);
  }
  return out.finish(in, mask);
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

void scale_(const Written& written, const Tensor& upstream) {
  const Tensors& kept = written.list;
  if (kept.empty() || no_compute(kept[0])) return;
  for (const Tensor& grad : kept) dtype_of(grad);
  if (is_one(upstream)) return;
  ReconstructionProblem p = rescale_problem(kept, upstream);
  Job job;
  job.reconstruction = &p;
  run(kept[0], job);
}

}  // namespace vaefast
