// IVON's draws and steps, where there are kernels for the tensors.

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

using Lists = std::initializer_list<const Tensors*>;

bool is_wrapped(const Tensor& t) { return t.layout() != at::kStrided || t.unsafeGetTensorImpl()->is_python_dispatch(); }

bool alike(const Tensor& a, const Tensor& b) { return a.scalar_type() == b.scalar_type() && a.device() == b.device(); }

// Whether each parameter and what belongs to it lie in memory in the same order, without gaps, in its dtype.
bool covers(const Tensors& params, Lists beside) {
  for (const Tensors* list : beside) {
    TORCH_CHECK_VALUE(list->size() == params.size(), "vaefast: ", list->size(), " tensors beside ", params.size(),
                      " parameters");
  }
  for (size_t k = 0; k < params.size(); ++k) {
    const Tensor& p = params[k];
    if (is_wrapped(p) || !p.is_non_overlapping_and_dense() || !alike(p, params[0])) return false;
    for (const Tensors* list : beside) {
      const Tensor& t = (*list)[k];
      if (is_wrapped(t) || !alike(t, p) || t.sizes() != p.sizes() || t.strides() != p.strides()) return false;
    }
  }
  const auto dtype = params.empty() ? at::kHalf : params[0].scalar_type();
  return (dtype == at::kFloat || dtype == at::kDouble) && device_for(params[0].device().type()).ivon;
}

std::vector<IvonProblem> problems_of(const Tensors& params, const Tensors& hess, const IvonNumbers& numbers) {
  std::vector<IvonProblem> problems(params.size());
  for (size_t k = 0; k < params.size(); ++k) {
    IvonProblem& p = problems[k];
    p.numbers = numbers;
    p.numel = params[k].numel();
    p.wide = is_double(params[k]);
    p.param = params[k].mutable_data_ptr();
    p.hess = hess[k].mutable_data_ptr();
  }
  return problems;
}

// A graph that kept what is written is to know of it.
void run(const Tensors& written, const std::vector<IvonProblem>& problems) {
  device_for(written[0].device().type()).ivon(problems.data(), int64_t(problems.size()));
  for (const Tensor& t : written) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

bool ivon_draw(const Tensors& params, const Tensors& means, const Tensors& noises, const Tensors& hess, double ess,
               double weight_decay, const MaybeGenerator& generator) {
  if (!covers(params, {&means, &noises, &hess})) return false;
  const c10::Device device = params[0].device();
  if (generator && generator->device().type() != device.type()) return false;
  IvonNumbers numbers;
  numbers.ess = ess;
  numbers.weight_decay = weight_decay;
  auto problems = problems_of(params, hess, numbers);
  uint64_t counters = 0;
  for (size_t k = 0; k < params.size(); ++k) {
    IvonProblem& p = problems[k];
    p.draw = true;
    p.mean = means[k].mutable_data_ptr();
    p.noise = noises[k].mutable_data_ptr();
    p.philox.offset_add = counters;
    counters += uint64_t(p.numel + 3) / 4;
  }
  const Tensor seed = fresh({2}, params[0].options().dtype(at::kLong));
  Philox philox;
  device_for(device.type()).philox(generator, int64_t(4 * counters), seed, philox);
  for (IvonProblem& p : problems) p.philox.seed = philox.seed, p.philox.offset = philox.offset;
  run(params, problems);
  return true;
}

bool ivon_step(const Tensors& params, const Tensors& momentum, const Tensors& hess, const Tensors& gradients,
               const Tensors& products, const IvonStep& numbers) {
  if (!covers(params, {&momentum, &hess, &gradients, &products})) return false;
  auto problems = problems_of(params, hess, numbers);
  for (size_t k = 0; k < params.size(); ++k) {
    IvonProblem& p = problems[k];
    p.momentum = momentum[k].mutable_data_ptr();
    p.gradient = gradients[k].const_data_ptr();
    p.product = products[k].const_data_ptr();
  }
  run(params, problems);
  return true;
}

}  // namespace vaefast
