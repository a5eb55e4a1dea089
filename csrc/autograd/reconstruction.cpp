// The node of a reconstruction.

#include "autograd/reconstruction.h"

#include <utility>

#include "autograd/entries.h"
#include "autograd/overwrite.h"

namespace vaefast {

namespace {

// Parameters that were written over are saved as what they now are, apart from the graph that made them. Their new
// version stops whoever has saved them as they were, and whoever changes them before backward is stopped by it.
void leave_to_gradients(ReconstructionInputs& in, Tensors& kept, const Mask& wanted, const Mask& over) {
  for (size_t k = 0, next = 0; k < over.size(); next += wanted[k++]) {
    if (!over[k]) continue;
    in.params[k].unsafeGetTensorImpl()->bump_version();
    in.params[k] = kept[next] = in.params[k].detach();
  }
}

struct ReconstructionNode : torch::autograd::Function<ReconstructionNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, at::TensorList, const ReconstructionInputs& in, const Reduced& reduced,
                        const Mask& wanted, Overwrite overwrite) {
    const Mask kept = kept_mask(in, reduced, wanted);
    const Mask over = overwrite == Overwrite::kParams ? overwritable(in, kept, {}) : Mask();
    const Tensors out = any(over) ? reconstruction_forward_over(over, in, reduced, kept)
                                  : below<reconstruction_forward>(in, reduced, kept);
    Archive archive;
    SavedReconstruction::put(archive, in, reduced, overwrite, wanted, Tensors(out.begin() + 1, out.end()), over);
    archive.keep(ctx);
    return out[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived archived(ctx);
    const SavedReconstruction saved(archived);
    const Mask mask = Edges(ctx).next(saved.in.params);
    variable_list grads(mask.size() + 4);
    if (any(mask)) spread(grads, 0, mask, saved.backward(upstream[0], mask));
    return grads;
  }
};

Tensor recorded_reconstruction(const ReconstructionInputs& in, const Reduced& reduced, Overwrite overwrite) {
  check_no_grad(in);
  const Mask wanted = wanted_grads(in.params);
  if (!any(wanted)) return below<reconstruction_forward>(in, reduced, wanted)[0];
  return ReconstructionNode::apply(at::TensorList(in.params), in, reduced, wanted, overwrite);
}

}  // namespace

void check_no_grad(const ReconstructionInputs& in) {
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || !(wants_grad(in.target) || wants_grad(in.weight)),
                    "vaefast: target and weight have gradients in the reference only");
}

Mask kept_mask(const ReconstructionInputs& in, const Reduced& reduced, const Mask& wanted) {
  return any(wanted) && keeps_gradients(in, reduced, wanted) ? wanted : Mask(wanted.size(), 0);
}

void SavedReconstruction::put(Archive& archive, ReconstructionInputs in, const Reduced& reduced, Overwrite overwrite,
                              const Mask& wanted, Tensors kept, const Mask& over) {
  if (any(over)) leave_to_gradients(in, kept, wanted, over);
  archive.put(in).put(reduced).put(overwrite != Overwrite::kNothing).put(wanted).put(kept);
  archive.put(any(over)).put(capture_of(in.target));
}

SavedReconstruction::SavedReconstruction(Archived& saved)
    : in(saved.take<ReconstructionInputs>()),
      reduced(saved.take<Reduced>()),
      in_place(saved.take<bool>()),
      wanted(saved.take<Mask>()),
      kept(saved.take<Tensors>()),
      overwritten(saved.take<bool>()),
      capture(saved.take<int64_t>()) {}

Tensors SavedReconstruction::backward(const Tensor& upstream, const Mask& mask) const {
  if (kept.empty() || at::GradMode::is_enabled()) {
    TORCH_CHECK(!overwritten,
                "vaefast: with overwrite_recon=True the gradient stands where recon stood, so that it "
                "cannot be differentiated again (create_graph=True); pass overwrite_recon=False");
    return differentiable<reconstruction_backward>(upstream, in, reduced, mask);
  }
  return rescaled(kept_for(mask, kept, wanted), upstream, final({upstream}));
}

Tensor reconstruction(const ReconstructionInputs& in, const Reduced& reduced, bool) {
  return recorded_reconstruction(in, reduced, Overwrite::kNothing);
}

Tensor eager::reconstruction(const ReconstructionInputs& in, const Reduced& reduced, bool overwrite_recon) {
  return recorded_reconstruction(in, reduced, overwrite_recon ? Overwrite::kParams : Overwrite::kKept);
}

}  // namespace vaefast
