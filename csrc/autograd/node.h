// What the autograd nodes have in common. Forward calls the *_forward operator; backward the *_backward operator, which
// under create_graph is PyTorch's (ops.cpp), or multiplies the gradients that forward kept.
//
// A node's apply() is given the tensors that it may have gradients for, and after them the groups that it works with:
// the graph sees the former alone, and backward returns as many gradients as apply() has arguments.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "arguments.h"

namespace vaefast {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a call may write over: nothing, where it is traced and must stay functional; what it keeps for backward itself;
// also the reconstruction's parameters, where the caller is done with them.
enum class Overwrite { kNothing, kKept, kParams };

inline MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : c10::nullopt; }

int64_t count(const Mask& mask);
bool any(const Mask& mask);

bool wants_grad(const Tensor& t);
bool wants_grad(const MaybeTensor& t);
bool wants_grad(const PosteriorInputs& in);

// One for each of the list.
Mask wanted_grads(const Tensors& list);

// Puts `values` at the places that the mask wants, undefined tensors elsewhere.
void spread(variable_list& out, size_t at, const Mask& mask, Tensors values);

// Which inputs backward must reach. Edges count the tensors that were given: an absent optional has none.
class Edges {
 public:
  explicit Edges(AutogradContext* ctx) : ctx_(ctx) {}

  bool next(bool present = true) { return present && ctx_->needs_input_grad(edge_++); }
  Mask next(const Tensors& list);
  Mask next(const PosteriorInputs& in);

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

// Whether t is memory of a CPU or a GPU that nothing wraps or traces.
bool is_plain(const Tensor& t);

// A tensor of which backward asks how it lies and not what is in it: an optimizer's step may change that in between.
Tensor shape_alone(const Tensor& t);

// Forward's last output, if it drew one, becomes an input of backward.
void take_seed(Tensors& out, MaybeTensor& seed, const Asked& asked);

// dz and dkl, as far as they are there.
std::pair<MaybeTensor, MaybeTensor> upstream_of(const variable_list& upstream, const Asked& asked);

// The graph that launches are being captured into: gradients that forward left in one graph and backward scales in
// another would be scaled again by every replay of the second.
int64_t capture_of(const Tensor& t);

// Whether backward, given `upstream`, may write over gradients that forward kept: nothing else can read them, as the
// graph is not retained, nothing is traced (compiled autograd works through modes) or differentiated again, and what
// comes down is one gradient, not a batch of them (is_grads_batched).
bool is_last_use(const variable_list& upstream);

// Of the gradients that forward kept, one for each `wanted`, those that the mask wants.
Tensors kept_for(const Mask& mask, const Tensors& kept, const Mask& wanted);

Tensors rescaled(Tensors kept, const Tensor& upstream, bool in_place);

// Unless what is computed is itself to be differentiated, a backward operator goes past autograd.
struct PastAutograd {
  c10::optional<at::AutoDispatchBelowADInplaceOrView> guard;

  PastAutograd() {
    if (!at::GradMode::is_enabled()) guard.emplace();
  }
};

// The operator f, below autograd.
template <auto f, class... Args>
auto below(const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatched<f>(args...);
}

// The operator f, in a way that can be differentiated where gradients are wanted of what it gives.
template <auto f, class... Args>
auto differentiable(const Args&... args) {
  const PastAutograd guard;
  return dispatched<f>(args...);
}

}  // namespace vaefast
