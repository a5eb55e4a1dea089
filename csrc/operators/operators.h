// The operators without autograd: outputs allocated, problems built and run. The same functions serve CPU, CUDA and
// Meta.
#pragma once

#include <array>

#include "arguments.h"

namespace vaefast {

using Places = std::array<Tensor, 4>;

// [z][kl][seed]: what was asked for; the seed where one was drawn.
Tensors posterior_forward(const PosteriorInputs& in, const Noise& noise, const MaybeGenerator& generator,
                          const PosteriorSpec& spec, const Asked& asked);
VF_OPERATOR(posterior_forward, "generator");

// Gradients of mu, raw, prior_mu, prior_logvar as far as the mask wants them. dz or dkl may be absent.
Tensors posterior_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in, const Noise& noise,
                           const PosteriorSpec& spec, const Mask& mask);
VF_OPERATOR(posterior_backward, "dz", "dkl", "mask");

// The same of packed moments: the mask has an entry for moments and one for the prior, and so have the gradients.
Tensors packed_forward(const PackedInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                       const PosteriorSpec& spec, const Asked& asked);
VF_OPERATOR(packed_forward, "seed", "generator");
Tensors packed_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PackedInputs& in, const MaybeTensor& seed,
                        const PosteriorSpec& spec, const Mask& mask);
VF_OPERATOR(packed_backward, "dz", "dkl", "seed", "mask");

// [z ...][kl][seed], and the KL's gradients, unscaled, where the mask (four entries a posterior) wants some kept.
Tensors multi_forward(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                      const PosteriorSpec& spec, const Asked& asked, const Mask& mask);
VF_OPERATOR(multi_forward, "seed", "generator", "mask");

// Of every posterior in turn, what posterior_backward gives. dz may be empty, or dkl absent.
Tensors multi_backward(const Tensors& dz, const MaybeTensor& dkl, const MultiInputs& in, const MaybeTensor& seed,
                       const PosteriorSpec& spec, const Mask& mask);
VF_OPERATOR(multi_backward, "dz", "dkl", "seed", "mask");

// nll, then the gradients that the mask wants, with the reduction's factor in them.
Tensors reconstruction_forward(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask);
VF_OPERATOR(reconstruction_forward, "mask");
Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const Reduced& reduced,
                                const Mask& mask);
VF_OPERATOR(reconstruction_backward, "upstream", "mask");

// loss, nll, kl, then gradients as reconstruction_forward's, and the posterior's as far as post_mask, if there is one,
// wants them; beta is in those.
Tensors elbo_forward(const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                     double beta, const Mask& mask, const Mask& post_mask);
VF_OPERATOR(elbo_forward, "beta", "mask", "post_mask");

// The gradients of an ELBO from those of its terms, nll and beta * kl: the reconstruction's, or where forward kept
// them, nothing but `kept` multiplied in place; then the posterior's. dnll or dkl may be absent, and their parts with
// them.
Tensors elbo_backward_(const Written& kept, const MaybeTensor& dnll, const MaybeTensor& dkl, double beta,
                       const ReconstructionInputs& rec, const PosteriorInputs& post, const PosteriorSpec& spec,
                       const Mask& mask, const Mask& post_mask);
VF_OPERATOR(elbo_backward_, "kept", "dnll", "dkl", "beta", "mask", "post_mask");

// [z][kl] of categorical latents: a one-hot sample where there are uniform numbers, [sites] of float64, and the KL. And
// the gradients of logits and prior as far as the mask wants them; dz or dkl may be absent.
Tensors categorical_forward(const MaybeTensor& uniforms, const CategoricalInputs& in, bool kl);
VF_OPERATOR(categorical_forward, "uniforms", "kl");
Tensors categorical_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const CategoricalInputs& in,
                             const Mask& mask);
VF_OPERATOR(categorical_backward, "dz", "dkl", "mask");

// log p(z) - log q(z) of each draw, [K, B], without the log(2 pi) of either; and the gradients in z, mu, logvar,
// prior_mu and prior_logvar as far as the mask wants them.
Tensor log_ratio_forward(const LogRatioInputs& in);
VF_OPERATOR(log_ratio_forward);
Tensors log_ratio_backward(const Tensor& g, const LogRatioInputs& in, const Mask& mask);
VF_OPERATOR(log_ratio_backward, "g", "mask");

// [mu, logvar] of a product of experts, [B, ...]; and the gradients in mus and logvars as far as the mask wants them.
// dmu or dlogvar may be absent.
Tensors experts_forward(const ExpertsInputs& in);
VF_OPERATOR(experts_forward);
Tensors experts_backward(const MaybeTensor& dmu, const MaybeTensor& dlogvar, const ExpertsInputs& in, const Mask& mask);
VF_OPERATOR(experts_backward, "dmu", "dlogvar", "mask");

// The negative importance-weighted bound, reduced, and the log weights [K, B], which are ratio + log p(x|z). Where the
// mask, which has an entry for each parameter and one for the ratio, wants something, also the negative of the ratio's
// gradient, and then the parameters' gradients, all with the reduction's factor in them.
Tensors bound_forward(const Tensor& ratio, const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask);
VF_OPERATOR(bound_forward, "ratio", "mask");
double scale_of_bound(const Reduced& reduced, int64_t samples);

// [D, B], and the gradients in z, mu and the log variance of the sum of g [B] times those.
Tensor marginals_forward(const MarginalsInputs& in);
VF_OPERATOR(marginals_forward);
Tensors marginals_backward(const Tensor& g, const Tensor& marginals, const MarginalsInputs& in);
VF_OPERATOR(marginals_backward, "g", "marginals");

// Each of kept *= upstream (0-d or [B]), in place.
void scale_(const Written& kept, const Tensor& upstream);
VF_OPERATOR(scale_, "kept", "upstream");

// log p(z) of each sample, [B]; and the gradients in z, mus, logvars and, if there are, logits, of the sum of g [B]
// times those.
Tensor mixture_forward(const MixtureInputs& in);
Tensors mixture_backward(const Tensor& g, const MixtureInputs& in);

// A draw of each parameter from its IVON posterior in its own place, its values into means and the difference into
// noises; and a step from gradients and products, of which ivon.h tells. False, and nothing done, where there is no
// kernel for these tensors.
bool ivon_draw(const Tensors& params, const Tensors& means, const Tensors& noises, const Tensors& hess, double ess,
               double weight_decay, const MaybeGenerator& generator);
bool ivon_step(const Tensors& params, const Tensors& momentum, const Tensors& hess, const Tensors& gradients,
               const Tensors& products, const IvonStep& numbers);

// posterior_backward, with gradients that have a place, which looks like their input, written there.
Tensors posterior_backward_into(const Places& places, const MaybeTensor& dz, const MaybeTensor& dkl,
                                const PosteriorInputs& in, const Noise& noise, const PosteriorSpec& spec,
                                const Mask& mask);

// The forwards with those gradients of which `over` says so written over the parameters themselves.
Tensors reconstruction_forward_over(const Mask& over, const ReconstructionInputs& in, const Reduced& reduced,
                                    const Mask& mask);
Tensors elbo_forward_over(const Mask& over, const ReconstructionInputs& rec, const PosteriorInputs& post,
                          const PosteriorSpec& spec, double beta, const Mask& mask, const Mask& post_mask);

// Whether all that an element's gradients depend on is read before the first of them is written.
bool reads_first(LikelihoodIndex likelihood);

// Whether forward can keep the masked gradients, unscaled, for backward to multiply.
bool keeps_gradients(const ReconstructionInputs& in, const Reduced& reduced, const Mask& mask);

// A tensor over dimension 0, or 0-d, as one that broadcasts over dim dimensions.
Tensor by_rows(const Tensor& t, int64_t dim);

// Whether it can be told here, without waiting for a device, that there is nothing to multiply by.
bool is_one(const Tensor& upstream);

}  // namespace vaefast
