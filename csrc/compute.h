// The operators without autograd: outputs allocated, problems built and run. The same functions serve CPU, CUDA and
// Meta.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "common.h"

namespace vaefast {

using at::Tensor;
using MaybeTensor = c10::optional<Tensor>;
using MaybeGenerator = c10::optional<at::Generator>;
using Tensors = std::vector<Tensor>;
using Name = c10::string_view;

// Everything about a posterior that is no tensor.
struct PosteriorSpec {
  double prior_mu = 0, prior_logvar = 0;  // where the prior's tensors are absent
  Activation activation;
  Reduction reduction = Reduction::kNone;
  bool sample = false, kl = false;
  // alpha, where the KL's gradient is alpha times the prior's and 1 - alpha times the posterior's
  c10::optional<double> balance;

  std::vector<double> pack() const;
  static PosteriorSpec unpack(c10::ArrayRef<double> packed);
};

struct PosteriorInputs {
  Tensor mu, raw;
  MaybeTensor prior_mu, prior_logvar, eps, seed;
  MaybeGenerator generator;
};

// Posteriors by the list; of priors there are as many, or none.
struct MultiInputs {
  Tensors mus, raws, prior_mus, prior_logvars;
  MaybeTensor seed;
  MaybeGenerator generator;
};

// Mean and log variance in one tensor, a posterior's and a prior's of the same shape.
struct PackedInputs {
  Tensor moments;
  MaybeTensor prior, seed;
  MaybeGenerator generator;
};

struct PackedSpec {
  PosteriorSpec posterior;
  int64_t dim = 1;                    // whose first half is the mean
  double prior_lo = 0, prior_hi = 0;  // the clamp of the prior's log variance

  std::vector<double> pack() const;
  static PackedSpec unpack(c10::ArrayRef<double> packed);
};

struct ReconstructionSpec {
  int64_t likelihood = 0;
  std::vector<double> options;
  Reduction reduction = Reduction::kBatchMean;
};

struct ReconstructionInputs {
  Tensors params;
  Tensor target;
  MaybeTensor weight;
};

using Mask = std::vector<bool>;
using Places = std::array<Tensor, 4>;

Activation activation_of(Name kind, double lo, double hi, double floor);
int64_t likelihood_of(Name name);

// [z][kl][seed]: what was asked for; the seed where one was drawn.
Tensors posterior_forward(const PosteriorInputs& in, const PosteriorSpec& spec);

// Gradients of mu, raw, prior_mu, prior_logvar as far as the mask wants them. dz or dkl may be absent. Where a place is
// given, which looks like its input, the gradient goes there.
Tensors posterior_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in,
                           const PosteriorSpec& spec, const Mask& mask, const Places& places = {});

// The same of packed moments: the mask has an entry for moments and one for the prior, and so have the gradients.
Tensors packed_forward(const PackedInputs& in, const PackedSpec& spec);
Tensors packed_backward(const MaybeTensor& dz, const MaybeTensor& dkl, const PackedInputs& in, const PackedSpec& spec,
                        const Mask& mask);

// [z ...][kl][seed], and the KL's gradients, unscaled, where the mask (four entries a posterior) wants some kept.
Tensors multi_forward(const MultiInputs& in, const PosteriorSpec& spec, const Mask& mask);

// Of every posterior in turn, what posterior_backward gives. dz may be empty, or dkl absent.
Tensors multi_backward(const Tensors& dz, const MaybeTensor& dkl, const MultiInputs& in, const PosteriorSpec& spec,
                       const Mask& mask);

// Whether all that an element's gradients depend on is read before the first of them is written.
bool reads_first(const ReconstructionSpec& spec);

// Whether forward can keep the masked gradients, unscaled, for backward to multiply.
bool keeps_gradients(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask);

// nll, then the gradients that the mask wants, with the reduction's factor in them; those of `over`, if it is given,
// are the parameters themselves, written over.
Tensors reconstruction_forward(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& mask,
                               const Mask& over = {});
Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const ReconstructionSpec& spec,
                                const Mask& mask);

// loss, nll, kl, then gradients as reconstruction_forward's, and the posterior's as far as post_mask, if there is one,
// wants them; beta is in those.
Tensors elbo_forward(const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                     const PosteriorSpec& post_spec, double beta, const Mask& mask, const Mask& post_mask,
                     const Mask& over = {});

// The gradients of an ELBO from those of its terms, nll and beta * kl: the reconstruction's, or where forward kept
// them, nothing but `kept` multiplied in place; then the posterior's. dnll or dkl may be absent, and their parts with
// them.
Tensors elbo_backward_(const Tensors& kept, const MaybeTensor& dnll, const MaybeTensor& dkl, double beta,
                       const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
                       const PosteriorSpec& post_spec, const Mask& mask, const Mask& post_mask);

// A tensor over dimension 0, or 0-d, as one that broadcasts over dim dimensions.
Tensor by_rows(const Tensor& t, int64_t dim);

// Whether it can be told here, without waiting for a device, that there is nothing to multiply by.
bool is_one(const Tensor& upstream);

// Each of kept *= upstream (0-d or [B]), in place.
void scale_(const Tensors& kept, const Tensor& upstream);

}  // namespace vaefast
