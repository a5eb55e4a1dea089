// The operators as users call them, with autograd.
#pragma once

#include "arguments.h"

namespace vaefast {

// [z][kl]
Tensors posterior(const PosteriorInputs& in, const Noise& noise, const MaybeGenerator& generator,
                  const PosteriorSpec& spec, const Asked& asked);
VF_OPERATOR(posterior, "generator");
Tensors packed_posterior(const PackedInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                         const PosteriorSpec& spec, const Asked& asked);
VF_OPERATOR(packed_posterior, "seed", "generator");

// [z ...][kl]
Tensors multi_posterior(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                        const PosteriorSpec& spec, const Asked& asked);
VF_OPERATOR(multi_posterior, "seed", "generator");

// [z][kl]
Tensors categorical(const MaybeTensor& uniforms, const CategoricalInputs& in, bool kl);
VF_OPERATOR(categorical, "uniforms", "kl");

// log p(z) - log q(z), [K, B]
Tensor log_ratio(const LogRatioInputs& in);
VF_OPERATOR(log_ratio);

// [mu, logvar] of a product of experts
Tensors experts(const ExpertsInputs& in);
VF_OPERATOR(experts);

// The negative importance-weighted bound, and the log weights, which are not differentiated.
Tensors bound(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced);
VF_OPERATOR(bound, "ratio");

// With overwrite_recon the caller is done with the likelihood's parameters.
Tensor reconstruction(const ReconstructionInputs& in, const Reduced& reduced, bool overwrite_recon);
VF_OPERATOR(reconstruction, "overwrite_recon");

// loss, nll, kl
using Terms = std::tuple<Tensor, Tensor, Tensor>;
Terms elbo(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec, double beta,
           bool overwrite_recon);
VF_OPERATOR(elbo, "beta", "overwrite_recon");

// The same for eager calls, which may write over what they keep for backward and, where the caller allows it, over the
// likelihood's parameters. What is traced stays functional.
namespace eager {
Tensors multi_posterior(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                        const PosteriorSpec& spec, const Asked& asked);
Tensor reconstruction(const ReconstructionInputs& in, const Reduced& reduced, bool overwrite_recon);
Tensors bound(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced);
Terms elbo(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec, double beta,
           bool overwrite_recon);
// the loss alone, without what autograd takes to give out the others
Tensor elbo_loss(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec, double beta,
                 bool overwrite_recon);
}  // namespace eager

}  // namespace vaefast
