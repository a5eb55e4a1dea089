// The operators as users call them, with autograd. Dispatcher entries and pybind11 entries both come here.
#pragma once

#include "compute.h"

namespace vaefast {

// What a call may write over: nothing, where it is traced and must stay functional; what it keeps for backward itself;
// also the reconstruction's parameters, where the caller is done with them.
enum class Overwrite { kNothing, kKept, kParams };

Tensors posterior(const PosteriorInputs& in, const PosteriorSpec& spec);
Tensor reconstruction(const ReconstructionInputs& in, const ReconstructionSpec& spec, Overwrite overwrite);

// loss, nll, kl; or the first alone, without what autograd takes to give out the others
Tensors elbo(const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
             const PosteriorSpec& post_spec, double beta, Overwrite overwrite, bool loss_alone);

// [z][kl]
Tensors packed_posterior(const PackedInputs& in, const PackedSpec& spec);

// [z ...][kl]
Tensors multi_posterior(const MultiInputs& in, const PosteriorSpec& spec, Overwrite overwrite);

// The operators below autograd, through the dispatcher, so that modes and tensor subclasses see them.
namespace dispatched {
Tensors posterior_forward(const PosteriorInputs& in, const PosteriorSpec& spec);
Tensors posterior_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in,
                           const PosteriorSpec& spec, const Mask& mask);
Tensors packed_forward(const PackedInputs& in, const PackedSpec& spec);
Tensors packed_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PackedInputs& in, const PackedSpec& spec,
                        const Mask& mask);
Tensors reconstruction_forward(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask);
Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const ReconstructionSpec& spec,
                                const Mask& mask);
Tensors elbo_forward(const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                     const PosteriorSpec& post_spec, double beta, const Mask& mask, const Mask& post_mask);
Tensors elbo_backward_(const Tensors& kept, const MaybeTensor& dnll, const MaybeTensor& dkl, double beta,
                       const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                       const PosteriorSpec& post_spec, const Mask& mask, const Mask& post_mask);
void scale_(const Tensors& kept, const Tensor& upstream);
Tensors multi_forward(const MultiInputs& in, const PosteriorSpec& spec, const Mask& mask);
Tensors multi_backward(const Tensors& dz, const MaybeTensor& dkl, const MultiInputs& in, const PosteriorSpec& spec,
                       const Mask& mask);
}  // namespace dispatched

}  // namespace vaefast
