// The log density of a mixture of Gaussians, and its gradients.

#include <algorithm>
#include <cmath>

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

class Mixture {
  // Differences that a chunk of the samples should have, how many chunks there may be, each of which keeps sums of its
  // own, and how many samples lie in a cache beside what is computed of them.
  static constexpr int64_t kWorth = 1 << 14, kMost = 8, kResident = 128;

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

  void run() {
    const auto on_device = device_for(in_.z.device().type()).mixture;
    TORCH_CHECK_VALUE(on_device, "vaefast: there is no kernel for a mixture of ", in_.z.device(), " tensors");
    const int64_t differences = p.samples * p.components * std::max<int64_t>(1, p.latents);
    p.chunks = std::clamp<int64_t>(std::min(differences / kWorth, p.samples / kResident), 1, kMost);
    constexpr int64_t lanes = MixtureProblem::kSampleLanes;
    p.together = std::min(kResident, (p.samples + lanes - 1) / lanes * lanes);
    p.size_scratch();
    held_.push_back(fresh({p.chunks * p.each}, in_.z.options().dtype(at::kDouble)));
    p.scratch = held_.back().mutable_data_ptr<double>();
    if (p.samples) on_device(p);
  }

  // What the chunks added up, from the i-th of their sums on.
  template <class T>
  void collect(int64_t i, const Tensor& out) const {
    T* to = out.mutable_data_ptr<T>();
    for (int64_t k = 0; k < out.numel(); ++k) to[k] = T(sum(i + k));
  }
  double sum(int64_t i) const {
    double found = 0;
    for (int64_t c = 0; p.samples && c < p.chunks; ++c) found += p.scratch[c * p.each + i];
    return found;
  }
  void collected(int64_t i, const Tensor& out) const { p.wide ? collect<double>(i, out) : collect<float>(i, out); }

  // From the log weights' gradient, which is what the chunks added up, to that of the logits.
  template <class T>
  void weigh(const Tensor& out) const {
    const T* logits = static_cast<const T*>(p.logits);
    T* to = out.mutable_data_ptr<T>();
    const double most = double(*std::max_element(logits, logits + p.components));
    double total = 0, weights = 0;
    for (int64_t k = 0; k < p.components; ++k) {
      total += sum(2 * p.latents * p.components + k);
      weights += std::exp(double(logits[k]) - most);
    }
    for (int64_t k = 0; k < p.components; ++k) {
      const double weight = std::exp(double(logits[k]) - most) / weights;
      to[k] = T(sum(2 * p.latents * p.components + k) - total * weight);
    }
  }
  void weighed(const Tensor& out) const { p.wide ? weigh<double>(out) : weigh<float>(out); }

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
  const Tensor dz = mixture.empty(in.z.sizes());
  p.dz = dz.mutable_data_ptr();
  mixture.run();
  const Tensor dmus = mixture.empty(in.mus.sizes()), dlogvars = mixture.empty(in.mus.sizes());
  mixture.collected(0, dmus);
  mixture.collected(p.components * p.latents, dlogvars);
  Tensors found{dz.to(in.z.scalar_type()), dmus.to(in.mus.scalar_type()), dlogvars.to(in.logvars.scalar_type())};
  if (in.logits) {
    const Tensor dlogits = mixture.empty(in.logits->sizes());
    mixture.weighed(dlogits);
    found.push_back(dlogits.to(in.logits->scalar_type()));
  }
  return found;
}

}  // namespace vaefast
