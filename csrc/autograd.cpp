// The autograd nodes. Forward calls the *_forward operator; backward the *_backward operator, which under create_graph
// is the reference's (ops.cpp), or multiplies the gradients that forward kept.

#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "archive.h"
#include "device.h"
#include "multi_tensor.h"
#include "ops.h"
#include "overwrite.h"

namespace vaefast {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : c10::nullopt; }

// Puts `values` at the places that the mask wants, undefined tensors elsewhere.
void spread(variable_list& out, size_t at, const Mask& mask, Tensors values) {
  size_t next = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    if (mask[k]) out[at + k] = std::move(values[next++]);
  }
}

// Which inputs backward must reach. Edges count the tensors that were given: an absent optional has none.
class Edges {
 public:
  explicit Edges(AutogradContext* ctx) : ctx_(ctx) {}

  bool next(bool present = true) { return present && ctx_->needs_input_grad(edge_++); }

  Mask next(const Tensors& list) {
    Mask mask(list.size());
    for (size_t k = 0; k < list.size(); ++k) mask[k] = next();
    return mask;
  }

  Mask next(const PosteriorInputs& in) {
    const bool mu = next(), raw = next(), prior_mu = next(in.prior_mu.has_value());
    return {mu, raw, prior_mu, next(in.prior_logvar.has_value())};
  }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

ptrdiff_t count(const Mask& mask) { return std::count(mask.begin(), mask.end(), true); }
bool any(const Mask& mask) { return count(mask) > 0; }

bool wants_grad(const Tensor& t) { return t.requires_grad(); }
bool wants_grad(const MaybeTensor& t) { return t && t->requires_grad(); }

bool wants_grad(const PosteriorInputs& in) {
  return at::GradMode::is_enabled() &&
         (wants_grad(in.mu) || wants_grad(in.raw) || wants_grad(in.prior_mu) || wants_grad(in.prior_logvar));
}

// The reference differentiates these; the kernels do not.
void check_no_grad(const ReconstructionInputs& in) {
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled() || !(wants_grad(in.target) || wants_grad(in.weight)),
                    "vaefast: target and weight have gradients in the reference only");
}

Mask wanted_grads(const Tensors& params) {
  Mask mask(params.size(), false);
  if (!at::GradMode::is_enabled()) return mask;
  for (size_t k = 0; k < params.size(); ++k) mask[k] = params[k].requires_grad();
  return mask;
}

// What reaches a term of the loss: a comes down from the loss, in which the term has a factor, b from the term itself.
// Where nothing does, or no input of the term wants a gradient, grad is undefined and the mask empty.
struct Upstream {
  Tensor grad;
  double factor = 1.0;  // still to be multiplied by

  Upstream(const Tensor& a, const Tensor& b, double beta, Mask& mask) {
    if (!any(mask)) return;
    if (a.defined() && b.defined()) {
      grad = (beta == 1.0 ? a : a * beta) + b;
    } else if (a.defined()) {
      grad = a;
      factor = beta;
    } else {
      grad = b;
    }
    if (!grad.defined()) mask.assign(mask.size(), false);
  }
};

// Forward's last output, if it drew one, becomes an input of backward.
void take_seed(Tensors& out, MaybeTensor& seed, const PosteriorSpec& spec) {
  if (out.size() == size_t(spec.sample) + size_t(spec.kl)) return;
  seed = std::move(out.back());
  out.pop_back();
}

// dz and dkl, as far as they are there.
std::pair<MaybeTensor, MaybeTensor> upstream_of(const variable_list& upstream, const PosteriorSpec& spec) {
  return {spec.sample ? maybe(upstream[0]) : c10::nullopt, spec.kl ? maybe(upstream[spec.sample]) : c10::nullopt};
}

struct PosteriorNode : torch::autograd::Function<PosteriorNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& raw, const MaybeTensor& prior_mu,
                               const MaybeTensor& prior_logvar, const MaybeTensor& eps, const MaybeTensor& seed,
                               const MaybeGenerator& generator, const PosteriorSpec& spec) {
    PosteriorInputs in{mu, raw, prior_mu, prior_logvar, eps, seed, generator};
    Tensors out = dispatched::posterior_forward(in, spec);
    take_seed(out, in.seed, spec);
    Archive().put(in).put(spec).keep(ctx);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<PosteriorInputs>();
    const auto spec = saved.take<PosteriorSpec>();
    const Mask mask = Edges(ctx).next(in);
    variable_list grads(8);
    const auto [dz, dkl] = upstream_of(upstream, spec);
    if (dz || dkl) spread(grads, 0, mask, dispatched::posterior_backward(dz, dkl, in, spec, mask));
    return grads;
  }
};

struct PackedNode : torch::autograd::Function<PackedNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& moments, const MaybeTensor& prior,
                               const MaybeTensor& seed, const MaybeGenerator& generator, const PackedSpec& spec) {
    PackedInputs in{moments, prior, seed, generator};
    Tensors out = dispatched::packed_forward(in, spec);
    take_seed(out, in.seed, spec.posterior);
    Archive().put(in).put(spec).keep(ctx);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<PackedInputs>();
    const auto spec = saved.take<PackedSpec>();
    Edges edges(ctx);
    const bool moments = edges.next();
    const Mask mask{moments, edges.next(in.prior.has_value())};
    variable_list grads(5);
    const auto [dz, dkl] = upstream_of(upstream, spec.posterior);
    if (dz || dkl) spread(grads, 0, mask, dispatched::packed_backward(dz, dkl, in, spec, mask));
    return grads;
  }
};

// The graph that launches are being captured into: gradients that forward left in one graph and backward scales in
// another would be scaled again by every replay of the second.
int64_t capture_of(const Tensor& t) {
  const auto capture = device_for(t.device().type()).capture;
  return capture ? int64_t(capture(t.device())) : 0;
}

// Whether backward may write over gradients that forward kept: nothing else can read them, as the graph is not
// retained, and nothing is traced (compiled autograd works through modes) or differentiated again.
bool is_last_use() {
  return !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Of the gradients that forward kept, one for each `wanted`, those that the mask wants.
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
    if (!is_one(upstream)) dispatched::scale_(kept, upstream);
    return kept;
  }
  for (Tensor& g : kept) g = (g * by_rows(upstream, g.dim())).to(g.scalar_type());
  return kept;
}

// What the nodes with a reconstruction save.
struct SavedReconstruction {
  ReconstructionInputs in;
  ReconstructionSpec spec;
  bool in_place;
  Mask wanted;   // at forward
  Tensors kept;  // one for each wanted, or none
  bool overwritten;
  int64_t capture;

  static void put(Archive& archive, ReconstructionInputs& in, const ReconstructionSpec& spec, Overwrite overwrite,
                  const Mask& wanted, Tensors kept, const Mask& over) {
    if (any(over)) leave_to_gradients(in, kept, wanted, over);
    archive.put(in).put(spec).put(double(overwrite != Overwrite::kNothing)).put(wanted).put(kept);
    archive.put(double(any(over))).put(double(capture_of(in.target)));
  }

  explicit SavedReconstruction(Archived& saved)
      : in(saved.take<ReconstructionInputs>()),
        spec(saved.take<ReconstructionSpec>()),
        in_place(saved.take<bool>()),
        wanted(saved.take<Mask>()),
        kept(saved.take<Tensors>()),
        overwritten(saved.take<bool>()),
        capture(saved.take<int64_t>()) {}

  // No replay of a CUDA graph reads the kept gradients after the first, if the same graph makes them anew each time.
  bool final() const { return in_place && is_last_use() && capture == capture_of(in.target); }

  Tensors backward(const Tensor& upstream, const Mask& mask) const {
    if (kept.empty() || at::GradMode::is_enabled()) {
      TORCH_CHECK(!overwritten,
                  "vaefast: with overwrite_recon=True the gradient stands where recon stood, so that it "
                  "cannot be differentiated again (create_graph=True); pass overwrite_recon=False");
      return dispatched::reconstruction_backward(upstream, in, spec, mask);
    }
    return rescaled(kept_for(mask, kept, wanted), upstream, final());
  }

 private:
  // Parameters that were written over are saved as what they now are, apart from the graph that made them. Their new
  // version stops whoever has saved them as they were, and whoever changes them before backward is stopped by it.
  static void leave_to_gradients(ReconstructionInputs& in, Tensors& kept, const Mask& wanted, const Mask& over) {
    for (size_t k = 0, next = 0; k < over.size(); next += wanted[k++]) {
      if (!over[k]) continue;
      in.params[k].unsafeGetTensorImpl()->bump_version();
      in.params[k] = kept[next] = in.params[k].detach();
    }
  }
};

// The mask of the gradients that forward should write.
Mask kept_mask(const ReconstructionInputs& in, const ReconstructionSpec& spec, const Mask& wanted) {
  return any(wanted) && keeps_gradients(in, spec, wanted) ? wanted : Mask(wanted.size(), false);
}

struct ReconstructionNode : torch::autograd::Function<ReconstructionNode> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, at::TensorList params, const Tensor& target, const MaybeTensor& weight,
                        const ReconstructionSpec& spec, const Mask& wanted, Overwrite overwrite) {
    ReconstructionInputs in{params.vec(), target, weight};
    const Mask kept = kept_mask(in, spec, wanted);
    const Mask over = overwrite == Overwrite::kParams ? overwritable(in, spec, kept, {}) : Mask();
    const Tensors out =
        any(over) ? reconstruction_forward(in, spec, kept, over) : dispatched::reconstruction_forward(in, spec, kept);
    Archive archive;
    SavedReconstruction::put(archive, in, spec, overwrite, wanted, Tensors(out.begin() + 1, out.end()), over);
    archive.keep(ctx);
    return out[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived archived(ctx);
    const SavedReconstruction saved(archived);
    const Mask mask = Edges(ctx).next(saved.in.params);
    variable_list grads(mask.size() + 5);
    if (any(mask)) spread(grads, 0, mask, saved.backward(upstream[0], mask));
    return grads;
  }
};

// Latents so few that a launch for their gradients alone takes longer than the arithmetic.
constexpr int64_t kFewLatents = 16384;

// The posterior's gradients that an ELBO's forward writes for backward to find: on a device that computes them with the
// KL, in float32 or float64, of few latents.
Mask kept_mask(const PosteriorInputs& in, Overwrite overwrite) {
  const Tensor given[] = {in.mu, in.raw, in.prior_mu.value_or(in.mu), in.prior_logvar.value_or(in.raw)};
  const bool fits = std::all_of(std::begin(given), std::end(given), [&](const Tensor& t) {
    return (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble) && t.sym_sizes() == in.mu.sym_sizes();
  });
  if (overwrite == Overwrite::kNothing || !fits || !device_for(in.mu.device().type()).both ||
      in.mu.numel() > kFewLatents)
    return {};
  const Mask mask{wants_grad(in.mu), wants_grad(in.raw), wants_grad(in.prior_mu), wants_grad(in.prior_logvar)};
  return any(mask) ? mask : Mask();
}

struct ElboNode : torch::autograd::Function<ElboNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList params, const Tensor& target,
                               const MaybeTensor& weight, const Tensor& mu, const Tensor& raw,
                               const MaybeTensor& prior_mu, const MaybeTensor& prior_logvar,
                               const ReconstructionSpec& rec_spec, const PosteriorSpec& post_spec, double beta,
                               const Mask& wanted, Overwrite overwrite, bool loss_alone) {
    ReconstructionInputs rec{params.vec(), target, weight};
    const PosteriorInputs post{mu, raw, prior_mu, prior_logvar, c10::nullopt, c10::nullopt, c10::nullopt};
    const Mask kept = kept_mask(rec, rec_spec, wanted), post_wanted = kept_mask(post, overwrite);
    Mask over;
    if (overwrite == Overwrite::kParams) {
      over = overwritable(rec, rec_spec, kept, {mu, raw, prior_mu, prior_logvar});
    }
    Tensors out = any(over) ? elbo_forward(rec, rec_spec, post, post_spec, beta, kept, post_wanted, over)
                            : dispatched::elbo_forward(rec, rec_spec, post, post_spec, beta, kept, post_wanted);
    const auto post_kept = out.end() - count(post_wanted);
    Archive archive;
    SavedReconstruction::put(archive, rec, rec_spec, overwrite, wanted, Tensors(out.begin() + 3, post_kept), over);
    archive.put(post).put(post_spec).put(beta).put(post_wanted).put(Tensors(post_kept, out.end())).keep(ctx);
    ctx->set_materialize_grads(false);
    out.resize(loss_alone ? 1 : 3);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    upstream.resize(3);
    Archived saved(ctx);
    const SavedReconstruction rec(saved);
    const auto post = saved.take<PosteriorInputs>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto beta = saved.take<double>();
    const auto post_wanted = saved.take<Mask>();
    const auto post_kept = saved.take<Tensors>();
    Edges edges(ctx);
    Mask mask = edges.next(rec.in.params);
    edges.next();  // target
    edges.next(rec.in.weight.has_value());
    Mask post_mask = edges.next(post);
    const size_t params = mask.size();
    variable_list grads(params + 12);
    const Upstream dnll(upstream[0], upstream[1], 1.0, mask);
    const Upstream dkl(upstream[0], upstream[2], beta, post_mask);
    if (!any(mask) && !any(post_mask)) return grads;
    if (rec.final()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      Tensors all = kept_for(mask, rec.kept, rec.wanted);
      // where all comes down from the loss, so do the gradients that forward kept of it
      const bool loss_alone = upstream[0].defined() && !upstream[1].defined() && !upstream[2].defined();
      if (loss_alone && !post_kept.empty() && all.size() == size_t(count(mask))) {
        for (Tensor& g : kept_for(post_mask, post_kept, post_wanted)) all.push_back(std::move(g));
        if (!is_one(upstream[0])) dispatched::scale_(all, upstream[0]);
        spread(grads, 0, mask, Tensors(all.begin(), all.begin() + count(mask)));
        spread(grads, params + 2, post_mask, Tensors(all.begin() + count(mask), all.end()));
        return grads;
      }
      const Tensors out = dispatched::elbo_backward_(all, maybe(dnll.grad), maybe(dkl.grad), dkl.factor, rec.in,
                                                     rec.spec, post, spec, mask, post_mask);
      all.insert(all.end(), out.begin(), out.end());
      spread(grads, 0, mask, Tensors(all.begin(), all.begin() + count(mask)));
      spread(grads, params + 2, post_mask, Tensors(all.begin() + count(mask), all.end()));
      return grads;
    }
    if (any(mask)) spread(grads, 0, mask, rec.backward(dnll.grad, mask));
    if (any(post_mask)) {
      const Tensor scaled = dkl.factor == 1.0 ? dkl.grad : dkl.grad * dkl.factor;
      spread(grads, params + 2, post_mask, dispatched::posterior_backward(c10::nullopt, scaled, post, spec, post_mask));
    }
    return grads;
  }
};

constexpr size_t kLists = 4;  // mus, raws, prior mus, prior log variances

// Four entries a posterior, from a list of flags of the tensors, list by list.
Mask by_posterior(const Mask& flags, size_t n, bool has_prior_mus, bool has_prior_logvars) {
  Mask mask(kLists * n, false);
  const size_t place[kLists] = {0, n, 2 * n, 2 * n + (has_prior_mus ? n : 0)};
  const bool present[kLists] = {true, true, has_prior_mus, has_prior_logvars};
  for (size_t k = 0; k < n; ++k) {
    for (size_t list = 0; list < kLists; ++list) {
      if (present[list]) mask[kLists * k + list] = flags[place[list] + k];
    }
  }
  return mask;
}

// Whether forward keeps a KL's gradients for backward to multiply. float16: unscaled they might underflow.
bool keeps_gradients(const MultiInputs& in, const PosteriorSpec& spec) {
  const auto half = [](const Tensors& list) {
    return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.scalar_type() == at::kHalf; });
  };
  const auto broadcast = [&](const Tensors& list) {
    for (size_t k = 0; k < list.size(); ++k) {
      if (list[k].sym_sizes() != in.mus[k].sym_sizes()) return true;
    }
    return false;
  };
  return !spec.sample && device_for(in.mus[0].device().type()).both && !half(in.mus) && !half(in.raws) &&
         !half(in.prior_mus) && !half(in.prior_logvars) &&
         (spec.reduction != Reduction::kPerSample || !(broadcast(in.prior_mus) || broadcast(in.prior_logvars)));
}

struct MultiNode : torch::autograd::Function<MultiNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList mus, at::TensorList raws, at::TensorList prior_mus,
                               at::TensorList prior_logvars, const MaybeTensor& seed, const MaybeGenerator& generator,
                               const PosteriorSpec& spec, const Mask& wanted, Overwrite overwrite) {
    MultiInputs in{mus.vec(), raws.vec(), prior_mus.vec(), prior_logvars.vec(), seed, generator};
    const bool keep = keeps_gradients(in, spec);
    Tensors out = dispatched::multi_forward(in, spec, keep ? wanted : Mask());
    const size_t outputs = (spec.sample ? in.mus.size() : 0) + size_t(spec.kl);
    auto kept = out.begin() + outputs;
    if (spec.sample && !seed) in.seed = *kept++;
    Archive archive;
    archive.put(in).put(spec).put(double(overwrite != Overwrite::kNothing)).put(wanted).put(Tensors(kept, out.end()));
    archive.put(double(capture_of(in.mus.at(0)))).keep(ctx);
    out.resize(outputs);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<MultiInputs>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto in_place = saved.take<bool>();
    const auto wanted = saved.take<Mask>();
    const auto kept = saved.take<Tensors>();
    const auto capture = saved.take<int64_t>();
    const size_t n = in.mus.size(), inputs = n + in.raws.size() + in.prior_mus.size() + in.prior_logvars.size();

    Edges edges(ctx);
    Mask flags(inputs);
    for (size_t k = 0; k < inputs; ++k) flags[k] = edges.next();
    const Mask mask = by_posterior(flags, n, !in.prior_mus.empty(), !in.prior_logvars.empty());
    const Tensor dkl = spec.kl ? upstream.back() : Tensor();
    const auto dz = upstream.begin(), dz_end = dz + (spec.sample ? n : 0);
    const bool samples = std::any_of(dz, dz_end, [](const Tensor& t) { return t.defined(); });
    variable_list grads(inputs + 5);
    if (!any(mask) || !(dkl.defined() || samples)) return grads;

    Tensors found;
    if (at::GradMode::is_enabled()) {
      found = one_by_one({dz, dz_end}, dkl, in, spec, mask);
    } else if (!kept.empty()) {
      const bool final = in_place && is_last_use() && capture == capture_of(in.mus[0]);
      found = rescaled(kept_for(mask, kept, wanted), dkl, final);
    } else {
      Tensors dzs;
      if (samples) dzs.assign(dz, dz_end);
      for (size_t k = 0; k < dzs.size(); ++k) {
        if (!dzs[k].defined()) dzs[k] = at::zeros_like(in.mus[k]);
      }
      found = dispatched::multi_backward(dzs, maybe(dkl), in, spec, mask);
    }
    const size_t place[kLists] = {0, n, 2 * n, 2 * n + in.prior_mus.size()};
    size_t index = 0;
    for (size_t k = 0; k < kLists * n; ++k) {
      if (mask[k]) grads[place[k % kLists] + k / kLists] = std::move(found[index++]);
    }
    return grads;
  }

 private:
  // Through the single posterior's operator, which knows how to be differentiated again.
  static Tensors one_by_one(const Tensors& dz, const Tensor& dkl, const MultiInputs& in, const PosteriorSpec& spec,
                            const Mask& mask) {
    Tensors found;
    Counters counters;
    for (size_t k = 0; k < in.mus.size(); ++k) {
      PosteriorInputs one = posterior_at(in, k);
      if (in.seed) one.seed = *in.seed + at::tensor({int64_t(0), counters.take(in.mus[k])}, in.seed->options());
      const Mask own(mask.begin() + kLists * k, mask.begin() + kLists * (k + 1));
      if (!any(own)) continue;
      Tensor upstream = dz.empty() ? Tensor() : dz[k];
      if (!upstream.defined() && !dkl.defined()) upstream = at::zeros_like(in.mus[k]);
      for (Tensor& g : dispatched::posterior_backward(maybe(upstream), maybe(dkl), one, spec, own)) {
        found.push_back(std::move(g));
      }
    }
    return found;
  }
};

}  // namespace

Tensors multi_posterior(const MultiInputs& in, const PosteriorSpec& spec, Overwrite overwrite) {
  Mask flags;
  for (const Tensors* list : {&in.mus, &in.raws, &in.prior_mus, &in.prior_logvars}) {
    const Mask wanted = wanted_grads(*list);
    flags.insert(flags.end(), wanted.begin(), wanted.end());
  }
  if (!any(flags)) {
    Tensors out = dispatched::multi_forward(in, spec, {});
    out.resize((spec.sample ? in.mus.size() : 0) + size_t(spec.kl));
    return out;
  }
  const size_t n = in.mus.size();
  const bool lists = in.raws.size() == n && (in.prior_mus.empty() || in.prior_mus.size() == n) &&
                     (in.prior_logvars.empty() || in.prior_logvars.size() == n);
  TORCH_CHECK_VALUE(lists, "vaefast: lists of different lengths");
  const Mask wanted = by_posterior(flags, n, !in.prior_mus.empty(), !in.prior_logvars.empty());
  return MultiNode::apply(at::TensorList(in.mus), at::TensorList(in.raws), at::TensorList(in.prior_mus),
                          at::TensorList(in.prior_logvars), in.seed, in.generator, spec, wanted, overwrite);
}

Tensors posterior(const PosteriorInputs& in, const PosteriorSpec& spec) {
  if (wants_grad(in)) {
    return PosteriorNode::apply(in.mu, in.raw, in.prior_mu, in.prior_logvar, in.eps, in.seed, in.generator, spec);
  }
  Tensors out = dispatched::posterior_forward(in, spec);
  out.resize(size_t(spec.sample) + size_t(spec.kl));
  return out;
}

Tensors packed_posterior(const PackedInputs& in, const PackedSpec& spec) {
  if (at::GradMode::is_enabled() && (wants_grad(in.moments) || wants_grad(in.prior))) {
    return PackedNode::apply(in.moments, in.prior, in.seed, in.generator, spec);
  }
  Tensors out = dispatched::packed_forward(in, spec);
  out.resize(size_t(spec.posterior.sample) + size_t(spec.posterior.kl));
  return out;
}

Tensor reconstruction(const ReconstructionInputs& in, const ReconstructionSpec& spec, Overwrite overwrite) {
  check_no_grad(in);
  const Mask wanted = wanted_grads(in.params);
  if (!any(wanted)) return dispatched::reconstruction_forward(in, spec, wanted)[0];
  return ReconstructionNode::apply(at::TensorList(in.params), in.target, in.weight, spec, wanted, overwrite);
}

Tensors elbo(const ReconstructionInputs& rec, const ReconstructionSpec& rec_spec, const PosteriorInputs& post,
             const PosteriorSpec& post_spec, double beta, Overwrite overwrite, bool loss_alone) {
  check_no_grad(rec);
  const Mask wanted = wanted_grads(rec.params);
  if (!any(wanted) && !wants_grad(post))
    return dispatched::elbo_forward(rec, rec_spec, post, post_spec, beta, wanted, {});
  return ElboNode::apply(at::TensorList(rec.params), rec.target, rec.weight, post.mu, post.raw, post.prior_mu,
                         post.prior_logvar, rec_spec, post_spec, beta, wanted, overwrite, loss_alone);
}

}  // namespace vaefast
