#include "autograd/node.h"

#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "device.h"
#include "operators/operators.h"

namespace vaefast {

int64_t count(const Mask& mask) { return std::count(mask.begin(), mask.end(), 1); }
bool any(const Mask& mask) { return count(mask) > 0; }

bool wants_grad(const Tensor& t) { return t.requires_grad(); }
bool wants_grad(const MaybeTensor& t) { return t && t->requires_grad(); }

bool wants_grad(const PosteriorInputs& in) {
  return at::GradMode::is_enabled() &&
         (wants_grad(in.mu) || wants_grad(in.raw) || wants_grad(in.prior_mu) || wants_grad(in.prior_logvar));
}

Mask wanted_grads(const Tensors& list) {
  Mask mask(list.size(), 0);
  if (!at::GradMode::is_enabled()) return mask;
  for (size_t k = 0; k < list.size(); ++k) mask[k] = list[k].requires_grad();
  return mask;
}

void spread(variable_list& out, size_t at, const Mask& mask, Tensors values) {
  size_t next = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (mask[k]) out[at + k] = std::move(values[next++]);
  }
}

Mask Edges::next(const Tensors& list) {
  Mask mask(list.size(), 0);
  for (size_t k = 0; k < list.size(); ++k) mask[k] = next();
  return mask;
}

Mask Edges::next(const PosteriorInputs& in) {
  Mask mask(4, 0);
  mask[0] = next();
  mask[1] = next();
  mask[2] = next(in.prior_mu.has_value());
  mask[3] = next(in.prior_logvar.has_value());
  return mask;
}

bool is_plain(const Tensor& t) {
  constexpr c10::DispatchKeySet kTraced({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return (t.is_cpu() || t.is_cuda()) && !t.key_set().has_any(kTraced) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

Tensor shape_alone(const Tensor& t) { return is_plain(t) ? t.variable_data() : t; }

void take_seed(Tensors& out, MaybeTensor& seed, const Asked& asked) {
  if (out.size() == asked.outputs()) return;
  seed = std::move(out.back());
  out.pop_back();
}

std::pair<MaybeTensor, MaybeTensor> upstream_of(const variable_list& upstream, const Asked& asked) {
  return {asked.sample ? maybe(upstream[0]) : c10::nullopt, asked.kl ? maybe(upstream[asked.sample]) : c10::nullopt};
}

int64_t capture_of(const Tensor& t) {
  const auto capture = device_for(t.device().type()).capture;
  return capture ? int64_t(capture(t.device())) : 0;
}

bool is_last_use(const variable_list& upstream) {
  constexpr c10::DispatchKeySet kBatched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  const bool batched = std::any_of(upstream.begin(), upstream.end(),
                                   [](const Tensor& t) { return t.defined() && t.key_set().has_any(kBatched); });
  return !batched && !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

Tensors kept_for(const Mask& mask, const Tensors& kept, const Mask& wanted) {
  Tensors list;
  if (kept.empty()) return list;
  size_t next = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (mask[k]) list.push_back(kept[next]);
    next += wanted[k];
  }
  return list;
}

Tensors rescaled(Tensors kept, const Tensor& upstream, bool in_place) {
  at::AutoDispatchBelowADInplaceOrView guard;
  if (in_place) {
    if (!is_one(upstream)) dispatched<scale_>(Written{kept}, upstream);
    return kept;
  }
  for (Tensor& g : kept) g = (g * by_rows(upstream, g.dim())).to(g.scalar_type());
  return kept;
}

}  // namespace vaefast
