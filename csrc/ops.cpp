// Every operator's registration and its pybind11 entry: the map of the rest.
//
//   vaefast::posterior, reconstruction, elbo, ...   as users call them, with autograd; autograd/entries.h
//   vaefast::*_forward, *_backward, *_              what those run, below autograd; operators/operators.h
//   vaefast::_differentiable_*_backward             the same gradients from PyTorch's; vaefast/_double_backward.py
//
// Their arguments are in arguments.h; faces.h makes schemas and kernels of them.

#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <ATen/Version.h>

#include <algorithm>
#include <map>
#include <utility>

#include "autograd/batched.h"
#include "autograd/entries.h"
#include "device.h"
#include "likelihoods/registries.h"
#include "operators/operators.h"

namespace vaefast {

Device& device_for(c10::DeviceType type) {
  static Device devices[c10::COMPILE_TIME_MAX_DEVICE_TYPES];
  return devices[static_cast<int>(type)];
}

namespace {

// A registry's names, and what it is called.
struct Names {
  const std::vector<std::string>& list;
  const char* what;
};

template <class E>
const Names& registry();

template <>
const Names& registry<Reduction>() {
  static const std::vector<std::string> list{"none", "per_sample", "batchmean", "sum", "mean", "per_draw"};
  static const Names names{list, "reduction"};
  return names;
}
template <>
const Names& registry<LikelihoodIndex>() {
  static const Names names{likelihood_names(), "likelihood"};
  return names;
}
template <>
const Names& registry<ParameterizationIndex>() {
  static const Names names{parameterization_names(), "parameterization"};
  return names;
}

}  // namespace

template <class E>
E named(Name name) {
  const auto& [list, what] = registry<E>();
  const auto found = std::find_if(list.begin(), list.end(), [&](const std::string& each) { return name == each; });
  TORCH_CHECK_VALUE(found != list.end(), "vaefast: unknown ", what, " '", name, "'");
  return E(found - list.begin());
}

template ParameterizationIndex named(Name name);

template <class E>
E numbered(int64_t number) {
  const auto& [list, what] = registry<E>();
  TORCH_CHECK_VALUE(number >= 0 && number < int64_t(list.size()), "vaefast: ", what, " number ", number, " of ",
                    list.size());
  return E(number);
}

template <class E>
Name name_of(E e) {
  return registry<E>().list[size_t(e)];
}

template Name name_of(LikelihoodIndex);

namespace {

// f above autograd: its kernel or, where its results are themselves to be differentiated (create_graph), the same
// through PyTorch.
constexpr const char* kDifferentiable = "_differentiable_";

template <auto f, class Function>
struct AboveAutograd;
template <auto f, class R, class... Flats>
struct AboveAutograd<f, R (*)(Flats...)> {
  static R call(Flats... flats) {
    if (at::GradMode::is_enabled()) {
      static const auto op = find<f>(kDifferentiable);
      return op.call(std::forward<Flats>(flats)...);
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find<f>();
    return op.call(std::forward<Flats>(flats)...);
  }
};

// An operator, for users or below autograd.
template <Floor F, auto f>
struct Registered {
  using F_ = Face<F, f>;
  static void define(torch::Library& m, const std::vector<at::Tag>& tags) { m.def(F_::schema().c_str(), tags); }
  static void implement(torch::Library& m) { m.impl(Operator<f>::name, F_::call); }
  static void implement_batched(torch::Library& m) {
    m.impl(Operator<f>::name, torch::CppFunction::makeFromBoxedFunction<&one_by_one>());
  }
};

// Above autograd it builds the node; below it (inference mode, no gradients) it runs forward alone.
template <auto f>
using ForUsers = Registered<Floor::kUsers, f>;
template <auto f>
using Below = Registered<Floor::kBelow, f>;

// One whose result may be differentiated.
template <auto f>
struct Differentiable : Below<f> {
  using F = Face<Floor::kBelow, f>;
  static void define(torch::Library& m, const std::vector<at::Tag>& tags) {
    Below<f>::define(m, tags);
    m.def(F::schema(kDifferentiable).c_str(), tags);
  }
  static void implement_above(torch::Library& m) {
    m.impl(Operator<f>::name, AboveAutograd<f, decltype(&F::call)>::call);
  }
};

// Operators, or lists of them.
template <class... Ops>
struct List {
  static void define(torch::Library& m, const std::vector<at::Tag>& tags) { (Ops::define(m, tags), ...); }
  static void implement(torch::Library& m) { (Ops::implement(m), ...); }
  static void implement_above(torch::Library& m) { (Ops::implement_above(m), ...); }
  static void implement_batched(torch::Library& m) { (Ops::implement_batched(m), ...); }
};

using RandomForUsers = List<ForUsers<posterior>, ForUsers<packed_posterior>, ForUsers<multi_posterior>>;
using OthersForUsers = List<ForUsers<reconstruction>, ForUsers<elbo>, ForUsers<categorical>, ForUsers<log_ratio>,
                            ForUsers<bound>, ForUsers<experts>>;
using RandomBelow = List<Below<posterior_forward>, Below<packed_forward>, Below<multi_forward>>;
using BackwardBelow =
    List<Differentiable<posterior_backward>, Differentiable<packed_backward>, Differentiable<reconstruction_backward>,
         Differentiable<categorical_backward>, Differentiable<log_ratio_backward>, Differentiable<experts_backward>>;
using OthersBelow =
    List<Below<reconstruction_forward>, Below<elbo_forward>, Below<elbo_backward_>, Below<multi_backward>,
         Below<scale_>, Below<marginals_forward>, Below<marginals_backward>, Below<categorical_forward>,
         Below<log_ratio_forward>, Below<bound_forward>, Below<experts_forward>>;

using EveryForUsers = List<RandomForUsers, OthersForUsers>;
using EveryBelow = List<RandomBelow, BackwardBelow, OthersBelow>;

}  // namespace

TORCH_LIBRARY(vaefast, m) {
  List<RandomForUsers, RandomBelow>::define(m, {at::Tag::nondeterministic_seeded});
  List<OthersForUsers, BackwardBelow, OthersBelow>::define(m, {});
}

TORCH_LIBRARY_IMPL(vaefast, CPU, m) { EveryBelow::implement(m); }
TORCH_LIBRARY_IMPL(vaefast, Meta, m) { EveryBelow::implement(m); }
#if defined(VAEFAST_CUDA)
TORCH_LIBRARY_IMPL(vaefast, CUDA, m) { EveryBelow::implement(m); }
#endif
TORCH_LIBRARY_IMPL(vaefast, Batched, m) { List<EveryForUsers, EveryBelow>::implement_batched(m); }
TORCH_LIBRARY_IMPL(vaefast, CompositeExplicitAutograd, m) { EveryForUsers::implement(m); }
TORCH_LIBRARY_IMPL(vaefast, Autograd, m) {
  EveryForUsers::implement(m);
  BackwardBelow::implement_above(m);
}

std::vector<std::string> devices() {
  std::vector<std::string> names;
  for (auto type : {c10::DeviceType::CUDA, c10::DeviceType::CPU}) {
    if (device_for(type).run) names.push_back(c10::DeviceTypeName(type, true));
  }
  return names;
}

// On which devices there are kernels of what is no ELBO.
std::map<std::string, std::vector<std::string>> kernels() {
  std::map<std::string, std::vector<std::string>> found;
  for (auto type : {c10::DeviceType::CUDA, c10::DeviceType::CPU}) {
    const Device& d = device_for(type);
    const std::pair<const char*, bool> all[] = {{"marginals", d.marginals}, {"categorical", d.categorical},
                                                {"log_ratio", d.log_ratio}, {"experts", d.experts},
                                                {"bound", d.bound},         {"mixture", d.mixture}};
    for (const auto& [name, there] : all) {
      auto& devices = found[name];
      if (there) devices.push_back(c10::DeviceTypeName(type, true));
    }
  }
  return found;
}

template <auto f>
constexpr auto python = Face<Floor::kPython, f>::call;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("posterior", python<posterior>, released);
  m.def("packed_posterior", python<packed_posterior>, released);
  m.def("multi_posterior", python<eager::multi_posterior>, released);
  m.def("reconstruction", python<eager::reconstruction>, released);
  m.def("elbo", python<eager::elbo>, released);
  m.def("elbo_loss", python<eager::elbo_loss>, released);
  m.def("categorical", python<categorical>, released);
  m.def("log_ratio", python<log_ratio>, released);
  m.def("bound", python<eager::bound>, released);
  m.def("experts", python<experts>, released);
  m.def("marginals_forward", python<marginals_forward>, released);
  m.def("marginals_backward", python<marginals_backward>, released);
  m.def("mixture_forward", python<mixture_forward>, released);
  m.def("mixture_backward", python<mixture_backward>, released);
  m.def("ivon_draw", python<ivon_draw>, released);
  m.def("ivon_step", python<ivon_step>, released);
  m.def("likelihoods", [] { return registry<LikelihoodIndex>().list; });
  m.def("parameterizations", [] { return registry<ParameterizationIndex>().list; });
  m.def("reductions", [] { return registry<Reduction>().list; });
  m.def("devices", devices);
  m.def("kernels", kernels);
  m.def("cpu_capability", at::get_cpu_capability);
}

}  // namespace vaefast
