// A posterior's operator in the making: its outputs, its gradients, and the problems that a device solves for them.
#pragma once

#include <array>

#include "compute.h"

namespace vaefast {

struct PosteriorOutputs {
  Tensor z, kl, seed;

  Tensors list() const {
    Tensors out;
    for (const Tensor& t : {z, kl, seed}) {
      if (t.defined()) out.push_back(t);
    }
    return out;
  }
};

PosteriorOutputs empty_outputs(const PosteriorInputs& in, const PosteriorSpec& spec);

// Noise comes from in.seed or, where there is none and out.seed is to tell it, from the generator.
PosteriorProblem forward_problem(const PosteriorInputs& in, const PosteriorSpec& spec, const PosteriorOutputs& out);

void use_seed(Philox& philox, const Tensor& seed, const Tensor& mu);

// The gradients of a posterior in the making.
class PosteriorGradients {
 public:
  // `spec` says of which outputs. A dkl that is not given is 1.
  PosteriorGradients(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorInputs& in,
                     const PosteriorSpec& spec, const Mask& mask, const Places& places = {});

  bool wide() const;

  // dkl comes without `factor`, which the KL has in the loss. `kl` is where its value goes, if it is wanted too.
  PosteriorProblem problem(double factor, const Tensor& kl = Tensor()) const;

  // Those that the mask wants.
  Tensors finish();

 private:
  const MaybeTensor &dz_, &dkl_;
  const PosteriorInputs& in_;
  const PosteriorSpec& spec_;
  const Mask& mask_;
  std::array<const Tensor*, 4> params_;
  Places grads_;
};

}  // namespace vaefast
