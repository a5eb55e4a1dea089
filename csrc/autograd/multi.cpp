// The node of posteriors by the list.

#include <ATen/TensorOperators.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>

#include "autograd/archive.h"
#include "autograd/entries.h"
#include "autograd/node.h"
#include "device.h"
#include "operators/multi.h"
#include "operators/operators.h"

namespace vaefast {

namespace {

constexpr size_t kLists = 4;  // mus, raws, prior mus, prior log variances

// Four entries a posterior, from a list of flags of the tensors, list by list.
Mask by_posterior(const Mask& flags, size_t n, bool has_prior_mus, bool has_prior_logvars) {
  Mask mask(kLists * n, 0);
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
bool keeps_gradients(const MultiInputs& in, const PosteriorSpec& spec, const Asked& asked) {
  const auto half = [](const Tensors& list) {
    return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.scalar_type() == at::kHalf; });
  };
  const auto broadcast = [&](const Tensors& list) {
    for (size_t k = 0; k < list.size(); ++k) {
      if (list[k].sym_sizes() != in.mus[k].sym_sizes()) return true;
    }
    return false;
  };
  return !asked.sample && device_for(in.mus[0].device().type()).both && !half(in.mus) && !half(in.raws) &&
         !half(in.prior_mus) && !half(in.prior_logvars) &&
         (spec.reduced.kind != Reduction::kPerSample || !(broadcast(in.prior_mus) || broadcast(in.prior_logvars)));
}

struct MultiNode : torch::autograd::Function<MultiNode> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                               const MultiInputs& in, MaybeTensor seed, const MaybeGenerator& generator,
                               const PosteriorSpec& spec, const Asked& asked, const Mask& wanted, Overwrite overwrite) {
    const bool keep = keeps_gradients(in, spec, asked);
    Tensors out = below<multi_forward>(in, seed, generator, spec, asked, keep ? wanted : Mask());
    const size_t outputs = (asked.sample ? in.mus.size() : 0) + size_t(asked.kl);
    auto kept = out.begin() + outputs;
    if (asked.sample && !seed) seed = *kept++;
    Archive archive;
    archive.put(in).put(seed).put(spec).put(asked).put(overwrite != Overwrite::kNothing).put(wanted);
    archive.put(Tensors(kept, out.end())).put(capture_of(in.mus.at(0))).keep(ctx);
    out.resize(outputs);
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Archived saved(ctx);
    const auto in = saved.take<MultiInputs>();
    const auto seed = saved.take<MaybeTensor>();
    const auto spec = saved.take<PosteriorSpec>();
    const auto asked = saved.take<Asked>();
    const auto in_place = saved.take<bool>();
    const auto wanted = saved.take<Mask>();
    const auto kept = saved.take<Tensors>();
    const auto capture = saved.take<int64_t>();
    const size_t n = in.mus.size(), inputs = n + in.raws.size() + in.prior_mus.size() + in.prior_logvars.size();

    Edges edges(ctx);
    Mask flags(inputs, 0);
    for (size_t k = 0; k < inputs; ++k) flags[k] = edges.next();
    const Mask mask = by_posterior(flags, n, !in.prior_mus.empty(), !in.prior_logvars.empty());
    const Tensor dkl = asked.kl ? upstream.back() : Tensor();
    const auto dz = upstream.begin(), dz_end = dz + (asked.sample ? n : 0);
    const bool samples = std::any_of(dz, dz_end, [](const Tensor& t) { return t.defined(); });
    variable_list grads(inputs + 7);
    if (!any(mask) || !(dkl.defined() || samples)) return grads;

    Tensors found;
    if (at::GradMode::is_enabled()) {
      found = one_by_one({dz, dz_end}, dkl, in, seed, spec, mask);
    } else if (!kept.empty()) {
      const bool final = in_place && is_last_use(upstream) && capture == capture_of(in.mus[0]);
      found = rescaled(kept_for(mask, kept, wanted), dkl, final);
    } else {
      Tensors dzs;
      if (samples) dzs.assign(dz, dz_end);
      for (size_t k = 0; k < dzs.size(); ++k) {
        if (!dzs[k].defined()) dzs[k] = at::zeros_like(in.mus[k]);
      }
      found = below<multi_backward>(dzs, maybe(dkl), in, seed, spec, mask);
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
  static Tensors one_by_one(const Tensors& dz, const Tensor& dkl, const MultiInputs& in, const MaybeTensor& seed,
                            const PosteriorSpec& spec, const Mask& mask) {
    Tensors found;
    Counters counters;
    for (size_t k = 0; k < in.mus.size(); ++k) {
      Noise noise;
      if (seed) noise.seed = *seed + at::tensor({int64_t(0), counters.take(in.mus[k])}, seed->options());
      const Mask own(mask.begin() + kLists * k, mask.begin() + kLists * (k + 1));
      if (!any(own)) continue;
      Tensor upstream = dz.empty() ? Tensor() : dz[k];
      if (!upstream.defined() && !dkl.defined()) upstream = at::zeros_like(in.mus[k]);
      const PosteriorInputs one = posterior_at(in, k);
      for (Tensor& g : differentiable<posterior_backward>(maybe(upstream), maybe(dkl), one, noise, spec, own)) {
        found.push_back(std::move(g));
      }
    }
    return found;
  }
};

Tensors recorded_multi(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                       const PosteriorSpec& spec, const Asked& asked, Overwrite overwrite) {
  Mask flags;
  for (const Tensors* list : {&in.mus, &in.raws, &in.prior_mus, &in.prior_logvars}) {
    const Mask wanted = wanted_grads(*list);
    flags.append(wanted.begin(), wanted.end());
  }
  const size_t n = in.mus.size();
  if (!any(flags)) {
    Tensors out = below<multi_forward>(in, seed, generator, spec, asked, Mask());
    out.resize((asked.sample ? n : 0) + size_t(asked.kl));
    return out;
  }
  const bool lists = in.raws.size() == n && (in.prior_mus.empty() || in.prior_mus.size() == n) &&
                     (in.prior_logvars.empty() || in.prior_logvars.size() == n);
  TORCH_CHECK_VALUE(lists, "vaefast: lists of different lengths");
  const Mask wanted = by_posterior(flags, n, !in.prior_mus.empty(), !in.prior_logvars.empty());
  return MultiNode::apply(at::TensorList(in.mus), at::TensorList(in.raws), at::TensorList(in.prior_mus),
                          at::TensorList(in.prior_logvars), in, seed, generator, spec, asked, wanted, overwrite);
}

}  // namespace

Tensors multi_posterior(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                        const PosteriorSpec& spec, const Asked& asked) {
  return recorded_multi(in, seed, generator, spec, asked, Overwrite::kNothing);
}

Tensors eager::multi_posterior(const MultiInputs& in, const MaybeTensor& seed, const MaybeGenerator& generator,
                               const PosteriorSpec& spec, const Asked& asked) {
  return recorded_multi(in, seed, generator, spec, asked, Overwrite::kKept);
}

}  // namespace vaefast
