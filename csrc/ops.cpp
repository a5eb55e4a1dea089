// Every operator's schema, its kernels, and its pybind11 entry: the map of the rest.
//
//   vaefast::posterior, reconstruction, elbo, ...   as users call them; autograd in autograd.cpp
//   vaefast::*_forward, *_backward, *_              what those run, below autograd; compute.cpp and its neighbours
//   vaefast::_differentiable_*_backward             the same gradients from the reference; vaefast/_double_backward.py
//
// A posterior's arguments are always P (tensors and constants of q and p) and A (its activation).

#include <torch/extension.h>
#include <torch/library.h>

#include <ATen/Version.h>

#include "device.h"
#include "likelihoods.h"
#include "ops.h"
#include "posterior.h"
#include "problem.h"

#define VF_P \
  "Tensor mu, Tensor raw, Tensor? prior_mu, float prior_mu_value, Tensor? prior_logvar, float prior_logvar_value"
#define VF_M \
  "Tensor[] mus, Tensor[] raws, Tensor[] prior_mus, float prior_mu, Tensor[] prior_logvars, float prior_logvar"
#define VF_K "Tensor moments, int dim, Tensor? prior, float prior_lo, float prior_hi"
#define VF_A "str parameterization, float lo, float hi, float floor"
#define VF_R "Tensor[] params, Tensor target, Tensor? weight, str likelihood, float[] options"
#define VF_POSTERIOR_BACKWARD                                            \
  "(Tensor? dz, Tensor? dkl, " VF_P ", Tensor? eps, Tensor? seed, " VF_A \
  ", str reduction, bool[] mask, float? balance=None) -> Tensor[]"
#define VF_PACKED_BACKWARD \
  "(Tensor? dz, Tensor? dkl, " VF_K ", Tensor? seed, float lo, float hi, str reduction, bool[] mask) -> Tensor[]"
#define VF_RECONSTRUCTION_BACKWARD "(Tensor upstream, " VF_R ", str reduction, bool[] mask) -> Tensor[]"

namespace vaefast {

Device& device_for(c10::DeviceType type) {
  static Device devices[c10::COMPILE_TIME_MAX_DEVICE_TYPES];
  return devices[static_cast<int>(type)];
}

namespace {

using MaybeRef = const MaybeTensor&;
using Numbers = c10::ArrayRef<double>;
using MaybeDouble = c10::optional<double>;

PosteriorSpec spec_of(double prior_mu, double prior_logvar, Name kind, double lo, double hi, double floor,
                      Name reduction, bool sample, bool kl, MaybeDouble balance = c10::nullopt) {
  return {prior_mu, prior_logvar, activation_of(kind, lo, hi, floor), reduction_of(reduction), sample, kl, balance};
}

PackedSpec spec_of(int64_t dim, double prior_lo, double prior_hi, double lo, double hi, Name reduction, bool sample,
                   bool kl) {
  return {spec_of(0, 0, LogVar::name, lo, hi, 0, reduction, sample, kl), dim, prior_lo, prior_hi};
}

ReconstructionSpec spec_of(Name likelihood, Numbers options, Name reduction) {
  return {likelihood_of(likelihood), options.vec(), reduction_of(reduction)};
}

Mask mask_of(const c10::List<bool>& mask) { return Mask(mask.begin(), mask.end()); }

// The boxed face of each operator below autograd.
Tensors op_posterior_forward(const Tensor& mu, const Tensor& raw, MaybeRef pm, double pm_value, MaybeRef plv,
                             double plv_value, MaybeRef eps, MaybeRef seed, MaybeGenerator generator, Name kind,
                             double lo, double hi, double floor, Name reduction, bool sample, bool kl) {
  return posterior_forward({mu, raw, pm, plv, eps, seed, generator},
                           spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, sample, kl));
}

Tensors op_posterior_backward(MaybeRef dz, MaybeRef dkl, const Tensor& mu, const Tensor& raw, MaybeRef pm,
                              double pm_value, MaybeRef plv, double plv_value, MaybeRef eps, MaybeRef seed, Name kind,
                              double lo, double hi, double floor, Name reduction, c10::List<bool> mask,
                              MaybeDouble balance) {
  return posterior_backward(
      dz, dkl, {mu, raw, pm, plv, eps, seed, c10::nullopt},
      spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, dz.has_value(), dkl.has_value(), balance),
      mask_of(mask));
}

Tensors op_packed_forward(const Tensor& moments, int64_t dim, MaybeRef prior, double prior_lo, double prior_hi,
                          MaybeRef seed, MaybeGenerator generator, double lo, double hi, Name reduction, bool sample,
                          bool kl) {
  return packed_forward({moments, prior, seed, generator},
                        spec_of(dim, prior_lo, prior_hi, lo, hi, reduction, sample, kl));
}

Tensors op_packed_backward(MaybeRef dz, MaybeRef dkl, const Tensor& moments, int64_t dim, MaybeRef prior,
                           double prior_lo, double prior_hi, MaybeRef seed, double lo, double hi, Name reduction,
                           c10::List<bool> mask) {
  return packed_backward(dz, dkl, {moments, prior, seed, c10::nullopt},
                         spec_of(dim, prior_lo, prior_hi, lo, hi, reduction, dz.has_value(), dkl.has_value()),
                         mask_of(mask));
}

Tensors op_reconstruction_forward(at::TensorList params, const Tensor& target, MaybeRef weight, Name likelihood,
                                  Numbers options, Name reduction, c10::List<bool> mask) {
  return reconstruction_forward({params.vec(), target, weight}, spec_of(likelihood, options, reduction), mask_of(mask));
}

Tensors op_reconstruction_backward(const Tensor& upstream, at::TensorList params, const Tensor& target, MaybeRef weight,
                                   Name likelihood, Numbers options, Name reduction, c10::List<bool> mask) {
  return reconstruction_backward(upstream, {params.vec(), target, weight}, spec_of(likelihood, options, reduction),
                                 mask_of(mask));
}

Tensors op_elbo_forward(at::TensorList params, const Tensor& target, MaybeRef weight, Name likelihood, Numbers options,
                        const Tensor& mu, const Tensor& raw, MaybeRef pm, double pm_value, MaybeRef plv,
                        double plv_value, Name kind, double lo, double hi, double floor, double beta, Name reduction,
                        c10::List<bool> mask, c10::List<bool> post_mask, MaybeDouble balance) {
  return elbo_forward({params.vec(), target, weight}, spec_of(likelihood, options, reduction),
                      {mu, raw, pm, plv, c10::nullopt, c10::nullopt, c10::nullopt},
                      spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, false, true, balance), beta,
                      mask_of(mask), mask_of(post_mask));
}

Tensors op_elbo_backward_(at::TensorList kept, MaybeRef dnll, MaybeRef dkl, double beta, at::TensorList params,
                          const Tensor& target, MaybeRef weight, Name likelihood, Numbers options, const Tensor& mu,
                          const Tensor& raw, MaybeRef pm, double pm_value, MaybeRef plv, double plv_value, Name kind,
                          double lo, double hi, double floor, Name reduction, c10::List<bool> mask,
                          c10::List<bool> post_mask, MaybeDouble balance) {
  return elbo_backward_(kept.vec(), dnll, dkl, beta, {params.vec(), target, weight},
                        spec_of(likelihood, options, reduction),
                        {mu, raw, pm, plv, c10::nullopt, c10::nullopt, c10::nullopt},
                        spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, false, true, balance),
                        mask_of(mask), mask_of(post_mask));
}

void op_scale_(at::TensorList kept, const Tensor& upstream) { scale_(kept.vec(), upstream); }

Tensors op_multi_forward(at::TensorList mus, at::TensorList raws, at::TensorList pms, double pm, at::TensorList plvs,
                         double plv, MaybeRef seed, MaybeGenerator generator, Name kind, double lo, double hi,
                         double floor, Name reduction, bool sample, bool kl, c10::List<bool> mask) {
  return multi_forward({mus.vec(), raws.vec(), pms.vec(), plvs.vec(), seed, generator},
                       spec_of(pm, plv, kind, lo, hi, floor, reduction, sample, kl), mask_of(mask));
}

Tensors op_multi_backward(at::TensorList dz, MaybeRef dkl, at::TensorList mus, at::TensorList raws, at::TensorList pms,
                          double pm, at::TensorList plvs, double plv, MaybeRef seed, Name kind, double lo, double hi,
                          double floor, Name reduction, c10::List<bool> mask) {
  return multi_backward(dz.vec(), dkl, {mus.vec(), raws.vec(), pms.vec(), plvs.vec(), seed, c10::nullopt},
                        spec_of(pm, plv, kind, lo, hi, floor, reduction, !dz.empty(), dkl.has_value()), mask_of(mask));
}

// The operators as users call them. EAGER calls come here from pybind11, traced ones through the dispatcher: they stay
// functional, whatever may be overwritten. Lists are what the two pass differently.
template <bool EAGER>
Overwrite overwrite_of(bool recon) {
  if (!EAGER) return Overwrite::kNothing;
  return recon ? Overwrite::kParams : Overwrite::kKept;
}

Tensors op_posterior(const Tensor& mu, const Tensor& raw, MaybeRef pm, double pm_value, MaybeRef plv, double plv_value,
                     MaybeRef eps, MaybeRef seed, MaybeGenerator generator, Name kind, double lo, double hi,
                     double floor, Name reduction, bool sample, bool kl, MaybeDouble balance) {
  return posterior({mu, raw, pm, plv, eps, seed, generator},
                   spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, sample, kl, balance));
}

Tensors op_packed_posterior(const Tensor& moments, int64_t dim, MaybeRef prior, double prior_lo, double prior_hi,
                            MaybeRef seed, MaybeGenerator generator, double lo, double hi, Name reduction, bool sample,
                            bool kl) {
  return packed_posterior({moments, prior, seed, generator},
                          spec_of(dim, prior_lo, prior_hi, lo, hi, reduction, sample, kl));
}

template <bool EAGER, class List, class Floats>
Tensor op_reconstruction(List params, const Tensor& target, MaybeRef weight, Name likelihood, const Floats& options,
                         Name reduction, bool overwrite_recon) {
  return reconstruction({{params.begin(), params.end()}, target, weight}, spec_of(likelihood, options, reduction),
                        overwrite_of<EAGER>(overwrite_recon));
}

using Terms = std::tuple<Tensor, Tensor, Tensor>;

// Terms, or the loss alone.
template <bool EAGER, class Result, class List, class Floats>
Result op_elbo(List params, const Tensor& target, MaybeRef weight, Name likelihood, const Floats& options,
               const Tensor& mu, const Tensor& raw, MaybeRef pm, double pm_value, MaybeRef plv, double plv_value,
               Name kind, double lo, double hi, double floor, double beta, Name reduction, MaybeDouble balance,
               bool overwrite_recon) {
  constexpr bool loss_alone = std::is_same_v<Result, Tensor>;
  const Tensors out = elbo({{params.begin(), params.end()}, target, weight}, spec_of(likelihood, options, reduction),
                           {mu, raw, pm, plv, c10::nullopt, c10::nullopt, c10::nullopt},
                           spec_of(pm_value, plv_value, kind, lo, hi, floor, reduction, false, true, balance), beta,
                           overwrite_of<EAGER>(overwrite_recon), loss_alone);
  if constexpr (loss_alone) {
    return out[0];
  } else {
    return {out[0], out[1], out[2]};
  }
}

template <bool EAGER, class List>
Tensors op_multi(List mus, List raws, List pms, double pm, List plvs, double plv, MaybeRef seed,
                 MaybeGenerator generator, Name kind, double lo, double hi, double floor, Name reduction, bool sample,
                 bool kl) {
  const auto list = [](const List& l) { return Tensors(l.begin(), l.end()); };
  return multi_posterior({list(mus), list(raws), list(pms), list(plvs), seed, generator},
                         spec_of(pm, plv, kind, lo, hi, floor, reduction, sample, kl), overwrite_of<EAGER>(false));
}

template <class F>
auto typed(const char* name, F*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<F>();
}

// A backward operator above autograd: its kernel or, where its results are themselves to be differentiated
// (create_graph), the reference's way of computing them.
struct PosteriorBackward {
  static constexpr auto kernel = op_posterior_backward;
  static constexpr const char* name = "vaefast::posterior_backward";
  static constexpr const char* differentiable = "vaefast::_differentiable_posterior_backward";
};

struct PackedBackward {
  static constexpr auto kernel = op_packed_backward;
  static constexpr const char* name = "vaefast::packed_backward";
  static constexpr const char* differentiable = "vaefast::_differentiable_packed_backward";
};

struct ReconstructionBackward {
  static constexpr auto kernel = op_reconstruction_backward;
  static constexpr const char* name = "vaefast::reconstruction_backward";
  static constexpr const char* differentiable = "vaefast::_differentiable_reconstruction_backward";
};

template <class Op, class F = decltype(Op::kernel)>
struct AboveAutograd;

template <class Op, class R, class... Args>
struct AboveAutograd<Op, R (*const)(Args...)> {
  static R call(Args... args) {
    if (at::GradMode::is_enabled()) {
      static const auto op = typed(Op::differentiable, Op::kernel);
      return op.call(std::forward<Args>(args)...);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = typed(Op::name, Op::kernel);
    return op.call(std::forward<Args>(args)...);
  }
};

void register_kernels(torch::Library& m) {
  m.impl("posterior_forward", op_posterior_forward);
  m.impl("posterior_backward", op_posterior_backward);
  m.impl("packed_forward", op_packed_forward);
  m.impl("packed_backward", op_packed_backward);
  m.impl("reconstruction_forward", op_reconstruction_forward);
  m.impl("reconstruction_backward", op_reconstruction_backward);
  m.impl("elbo_forward", op_elbo_forward);
  m.impl("elbo_backward_", op_elbo_backward_);
  m.impl("scale_", op_scale_);
  m.impl("multi_forward", op_multi_forward);
  m.impl("multi_backward", op_multi_backward);
}

// Above autograd they build the node; below it (inference mode, no gradients) they run forward alone.
void register_entries(torch::Library& m) {
  m.impl("posterior", op_posterior);
  m.impl("packed_posterior", op_packed_posterior);
  m.impl("reconstruction", op_reconstruction<false, at::TensorList, Numbers>);
  m.impl("elbo", op_elbo<false, Terms, at::TensorList, Numbers>);
  m.impl("multi_posterior", op_multi<false, at::TensorList>);
}

// Unless what is computed is itself to be differentiated, AboveAutograd need not be passed.
struct PastAutograd {
  c10::optional<at::AutoDispatchBelowADInplaceOrView> guard;

  PastAutograd() {
    if (!at::GradMode::is_enabled()) guard.emplace();
  }
};

Name name_of(Reduction r) {
  constexpr const char* names[] = {"none", "per_sample", "batchmean", "sum", "mean"};
  return names[int(r)];
}

template <class List>
Name name_at(int64_t index) {
  static const auto names = names_of(List{});
  return names.at(index);
}

c10::List<bool> list_of(const Mask& mask) {
  c10::List<bool> list;
  for (bool b : mask) list.push_back(b);
  return list;
}

Name kind_of(const PosteriorSpec& s) { return name_at<Parameterizations>(s.activation.kind); }
Name likelihood_name(const ReconstructionSpec& s) { return name_at<Likelihoods>(s.likelihood); }

}  // namespace

namespace dispatched {

Tensors posterior_forward(const PosteriorInputs& in, const PosteriorSpec& s) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::posterior_forward", op_posterior_forward);
  const Activation& a = s.activation;
  return op.call(in.mu, in.raw, in.prior_mu, s.prior_mu, in.prior_logvar, s.prior_logvar, in.eps, in.seed, in.generator,
                 kind_of(s), a.lo.wide, a.hi.wide, a.floor.wide, name_of(s.reduction), s.sample, s.kl);
}

Tensors posterior_backward(MaybeRef dz, MaybeRef dkl, const PosteriorInputs& in, const PosteriorSpec& s,
                           const Mask& mask) {
  const PastAutograd guard;
  static const auto op = typed("vaefast::posterior_backward", op_posterior_backward);
  const Activation& a = s.activation;
  return op.call(dz, dkl, in.mu, in.raw, in.prior_mu, s.prior_mu, in.prior_logvar, s.prior_logvar, in.eps, in.seed,
                 kind_of(s), a.lo.wide, a.hi.wide, a.floor.wide, name_of(s.reduction), list_of(mask), s.balance);
}

Tensors packed_forward(const PackedInputs& in, const PackedSpec& s) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::packed_forward", op_packed_forward);
  const PosteriorSpec& p = s.posterior;
  return op.call(in.moments, s.dim, in.prior, s.prior_lo, s.prior_hi, in.seed, in.generator, p.activation.lo.wide,
                 p.activation.hi.wide, name_of(p.reduction), p.sample, p.kl);
}

Tensors packed_backward(MaybeRef dz, MaybeRef dkl, const PackedInputs& in, const PackedSpec& s, const Mask& mask) {
  const PastAutograd guard;
  static const auto op = typed("vaefast::packed_backward", op_packed_backward);
  const PosteriorSpec& p = s.posterior;
  return op.call(dz, dkl, in.moments, s.dim, in.prior, s.prior_lo, s.prior_hi, in.seed, p.activation.lo.wide,
                 p.activation.hi.wide, name_of(p.reduction), list_of(mask));
}

Tensors reconstruction_forward(const ReconstructionInputs& in, const ReconstructionSpec& s, const Mask& mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::reconstruction_forward", op_reconstruction_forward);
  return op.call(in.params, in.target, in.weight, likelihood_name(s), s.options, name_of(s.reduction), list_of(mask));
}

Tensors reconstruction_backward(const Tensor& upstream, const ReconstructionInputs& in, const ReconstructionSpec& s,
                                const Mask& mask) {
  const PastAutograd guard;
  static const auto op = typed("vaefast::reconstruction_backward", op_reconstruction_backward);
  return op.call(upstream, in.params, in.target, in.weight, likelihood_name(s), s.options, name_of(s.reduction),
                 list_of(mask));
}

Tensors elbo_forward(const ReconstructionInputs& rec, const ReconstructionSpec& rs, const PosteriorInputs& post,
                     const PosteriorSpec& ps, double beta, const Mask& mask, const Mask& post_mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::elbo_forward", op_elbo_forward);
  const Activation& a = ps.activation;
  return op.call(rec.params, rec.target, rec.weight, likelihood_name(rs), rs.options, post.mu, post.raw, post.prior_mu,
                 ps.prior_mu, post.prior_logvar, ps.prior_logvar, kind_of(ps), a.lo.wide, a.hi.wide, a.floor.wide, beta,
                 name_of(rs.reduction), list_of(mask), list_of(post_mask), ps.balance);
}

Tensors elbo_backward_(const Tensors& kept, MaybeRef dnll, MaybeRef dkl, double beta, const ReconstructionInputs& rec,
                       const ReconstructionSpec& rs, const PosteriorInputs& post, const PosteriorSpec& ps,
                       const Mask& mask, const Mask& post_mask) {
  static const auto op = typed("vaefast::elbo_backward_", op_elbo_backward_);
  const Activation& a = ps.activation;
  return op.call(kept, dnll, dkl, beta, rec.params, rec.target, rec.weight, likelihood_name(rs), rs.options, post.mu,
                 post.raw, post.prior_mu, ps.prior_mu, post.prior_logvar, ps.prior_logvar, kind_of(ps), a.lo.wide,
                 a.hi.wide, a.floor.wide, name_of(rs.reduction), list_of(mask), list_of(post_mask), ps.balance);
}

void scale_(const Tensors& kept, const Tensor& upstream) {
  static const auto op = typed("vaefast::scale_", op_scale_);
  op.call(kept, upstream);
}

Tensors multi_forward(const MultiInputs& in, const PosteriorSpec& s, const Mask& mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::multi_forward", op_multi_forward);
  const Activation& a = s.activation;
  return op.call(in.mus, in.raws, in.prior_mus, s.prior_mu, in.prior_logvars, s.prior_logvar, in.seed, in.generator,
                 kind_of(s), a.lo.wide, a.hi.wide, a.floor.wide, name_of(s.reduction), s.sample, s.kl, list_of(mask));
}

Tensors multi_backward(const Tensors& dz, MaybeRef dkl, const MultiInputs& in, const PosteriorSpec& s,
                       const Mask& mask) {
  at::AutoDispatchBelowADInplaceOrView guard;
  static const auto op = typed("vaefast::multi_backward", op_multi_backward);
  const Activation& a = s.activation;
  return op.call(dz, dkl, in.mus, in.raws, in.prior_mus, s.prior_mu, in.prior_logvars, s.prior_logvar, in.seed,
                 kind_of(s), a.lo.wide, a.hi.wide, a.floor.wide, name_of(s.reduction), list_of(mask));
}

}  // namespace dispatched

TORCH_LIBRARY(vaefast, m) {
  const auto random = std::vector<at::Tag>{at::Tag::nondeterministic_seeded};
  m.def("posterior(" VF_P ", Tensor? eps, Tensor? seed, Generator? generator, " VF_A
        ", str reduction, bool sample, bool kl, float? balance=None) -> Tensor[]",
        random);
  m.def("posterior_forward(" VF_P ", Tensor? eps, Tensor? seed, Generator? generator, " VF_A
        ", str reduction, bool sample, bool kl) -> Tensor[]",
        random);
  m.def("posterior_backward" VF_POSTERIOR_BACKWARD);
  m.def("_differentiable_posterior_backward" VF_POSTERIOR_BACKWARD);
  m.def("packed_posterior(" VF_K
        ", Tensor? seed, Generator? generator, float lo, float hi, str reduction, bool sample, bool kl) -> Tensor[]",
        random);
  m.def("packed_forward(" VF_K
        ", Tensor? seed, Generator? generator, float lo, float hi, str reduction, bool sample, bool kl) -> Tensor[]",
        random);
  m.def("packed_backward" VF_PACKED_BACKWARD);
  m.def("_differentiable_packed_backward" VF_PACKED_BACKWARD);
  m.def("reconstruction(" VF_R ", str reduction, bool overwrite_recon=False) -> Tensor");
  m.def("reconstruction_forward(" VF_R ", str reduction, bool[] mask) -> Tensor[]");
  m.def("reconstruction_backward" VF_RECONSTRUCTION_BACKWARD);
  m.def("_differentiable_reconstruction_backward" VF_RECONSTRUCTION_BACKWARD);
  m.def("elbo(" VF_R ", " VF_P ", " VF_A
        ", float beta, str reduction, float? balance=None, bool overwrite_recon=False) -> (Tensor, Tensor, Tensor)");
  m.def("elbo_forward(" VF_R ", " VF_P ", " VF_A
        ", float beta, str reduction, bool[] mask, bool[] post_mask=[], float? balance=None) -> Tensor[]");
  m.def("elbo_backward_(Tensor(a!)[] kept, Tensor? dnll, Tensor? dkl, float beta, " VF_R ", " VF_P ", " VF_A
        ", str reduction, bool[] mask, bool[] post_mask, float? balance=None) -> Tensor[]");
  m.def("multi_posterior(" VF_M ", Tensor? seed, Generator? generator, " VF_A
        ", str reduction, bool sample, bool kl) -> Tensor[]",
        random);
  m.def("multi_forward(" VF_M ", Tensor? seed, Generator? generator, " VF_A
        ", str reduction, bool sample, bool kl, bool[] mask) -> Tensor[]",
        random);
  m.def("multi_backward(Tensor[] dz, Tensor? dkl, " VF_M ", Tensor? seed, " VF_A
        ", str reduction, bool[] mask) -> Tensor[]");
  m.def("scale_(Tensor(a!)[] kept, Tensor upstream) -> ()");
}

TORCH_LIBRARY_IMPL(vaefast, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(vaefast, Meta, m) { register_kernels(m); }
#if defined(VAEFAST_CUDA)
TORCH_LIBRARY_IMPL(vaefast, CUDA, m) { register_kernels(m); }
#endif
TORCH_LIBRARY_IMPL(vaefast, Autograd, m) {
  register_entries(m);
  m.impl("posterior_backward", AboveAutograd<PosteriorBackward>::call);
  m.impl("packed_backward", AboveAutograd<PackedBackward>::call);
  m.impl("reconstruction_backward", AboveAutograd<ReconstructionBackward>::call);
}
TORCH_LIBRARY_IMPL(vaefast, CompositeExplicitAutograd, m) { register_entries(m); }

std::vector<std::string> devices() {
  std::vector<std::string> names;
  for (auto type : {c10::DeviceType::CUDA, c10::DeviceType::CPU}) {
    if (device_for(type).run) names.push_back(c10::DeviceTypeName(type, true));
  }
  return names;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("posterior", op_posterior, released);
  m.def("packed_posterior", op_packed_posterior, released);
  m.def("reconstruction", op_reconstruction<true, const Tensors&, std::vector<double>>, released);
  m.def("elbo", op_elbo<true, Terms, const Tensors&, std::vector<double>>, released);
  m.def("elbo_loss", op_elbo<true, Tensor, const Tensors&, std::vector<double>>, released);
  m.def("multi_posterior", op_multi<true, const Tensors&>, released);
  m.def("likelihoods", [] { return names_of(Likelihoods{}); });
  m.def("parameterizations", [] { return names_of(Parameterizations{}); });
  m.def("devices", devices);
  m.def("cpu_capability", at::get_cpu_capability);
}

}  // namespace vaefast
