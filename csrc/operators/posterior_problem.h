// A posterior's operator in the making: its outputs, its gradients, and the problems that a device solves for them.
#pragma once

#include <array>

#include "operators/operators.h"

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

// What an operator was given. The inputs and their spec outlive it.
struct PosteriorCall {
  const PosteriorInputs& in;
  Noise noise;
  const PosteriorSpec& spec;
  Asked asked;
};

// Whether arithmetic is in double.
bool is_wide(const PosteriorCall& call);

PosteriorOutputs empty_outputs(const PosteriorCall& call);

// Noise comes from the call's or, where there is none and out.seed is to tell it, from the generator.
PosteriorProblem forward_problem(const PosteriorCall& call, const PosteriorOutputs& out,
                                 const MaybeGenerator& generator = c10::nullopt);

// The gradients of a posterior in the making.
class PosteriorGradients {
 public:
  // The call says of which outputs. A dkl that is not given is 1.
  PosteriorGradients(const MaybeTensor& dz, const MaybeTensor& dkl, const PosteriorCall& call, const Mask& mask,
                     const Places& places = {});

  bool wide() const;

  // dkl comes without `factor`, which the KL has in the loss. `kl` is where its value goes, if it is wanted too.
  PosteriorProblem problem(double factor, const Tensor& kl = Tensor()) const;

  // Those that the mask wants.
  Tensors finish();

 private:
  const MaybeTensor &dz_, &dkl_;
  const PosteriorCall& call_;
  const Mask& mask_;
  std::array<const Tensor*, 4> params_;
  Places grads_;
};

}  // namespace vaefast
