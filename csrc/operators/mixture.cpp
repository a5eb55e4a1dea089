// The log density of a mixture of Gaussians, and its gradients.

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

class Mixture {
 public:
  explicit Mixture(const MixtureInputs& in) : in_(in) {
    TORCH_CHECK_VALUE(in.z.dim() == 2 && in.mus.dim() == 2 && in.mus.size(0) > 0 && in.z.size(1) == in.mus.size(1) &&
                          in.logvars.sizes() == in.mus.sizes(),
                      "vaefast: a mixture takes z [B, D], mus and logvars [K, D], got ", in.z.sizes(), ", ",
                      in.mus.sizes(), " and ", in.logvars.sizes());
    TORCH_CHECK_VALUE(!in.logits || (in.logits->dim() == 1 && in.logits->size(0) == in.mus.size(0)),
                      "vaefast: a mixture of ", in.mus.size(0), " components has as many logits");
    dtype_ = promote(promote(promote(promote(at::kFloat, in.z), in.mus), in.logvars), in.logits);
    p.samples = in.z.size(0), p.components = in.mus.size(0), p.latents = in.z.size(1);
    p.wide = dtype_ == at::kDouble;
    p.z = data(in.z), p.mus = data(in.mus), p.logvars = data(in.logvars);
    if (in.logits) p.logits = data(*in.logits);
  }

  Tensor empty(at::IntArrayRef sizes) const { return fresh(sizes, in_.z.options().dtype(dtype_)); }

  const void* data(const Tensor& t) {
    TORCH_CHECK_VALUE(t.device() == in_.z.device(), "vaefast: tensors on ", t.device(), " and ", in_.z.device());
    TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), "vaefast: a mixture of ", t.scalar_type());
    held_.push_back(t.to(dtype_).contiguous());
    return held_.back().const_data_ptr();
  }

  void run() const {
    if (p.samples) vaefast::run(in_.z, p, &Device::mixture, "a mixture");
  }

  MixtureProblem p;

 private:
  const MixtureInputs& in_;
  at::ScalarType dtype_ = at::kFloat;
  Tensors held_;
};

}  // namespace

Tensor mixture_forward(const MixtureInputs& in) {
  Mixture mixture(in);
  const Tensor value = mixture.empty({in.z.size(0)});
  mixture.p.value = value.mutable_data_ptr();
  mixture.run();
  return value;
}

Tensors mixture_backward(const Tensor& g, const MixtureInputs& in) {
  Mixture mixture(in);
  MixtureProblem& p = mixture.p;
  TORCH_CHECK_VALUE(g.dim() == 1 && g.size(0) == p.samples, "vaefast: a gradient of shape ", g.sizes(), " for ",
                    p.samples, " densities");
  p.backward = true;
  p.g = mixture.data(g);
  const MaybeTensor given[] = {in.z, in.mus, in.logvars, in.logits};
  void** places[] = {&p.dz, &p.dmus, &p.dlogvars, &p.dlogits};
  Tensors found;
  for (int k = 0; k < 4 && given[k]; ++k) {
    found.push_back(mixture.empty(given[k]->sizes()));
    *places[k] = found.back().mutable_data_ptr();
  }
  mixture.run();
  for (size_t k = 0; k < found.size(); ++k) {
    if (p.samples == 0) found[k].zero_();
    found[k] = found[k].to(given[k]->scalar_type());
  }
  return found;
}

}  // namespace vaefast
