// Posteriors by the list: a hierarchy's levels or a network's weights in one parallel loop. Their KLs add up.

#include "operators/multi.h"

#include <algorithm>
#include <utility>

#include "device.h"
#include "operators/outputs.h"
#include "operators/posterior_problem.h"

namespace vaefast {

namespace {

size_t check_lists(const MultiInputs& in) {
  const size_t n = in.mus.size();
  TORCH_CHECK_VALUE(n > 0, "vaefast: an empty list of posteriors");
  TORCH_CHECK_VALUE(in.raws.size() == n, "vaefast: ", n, " mus but ", in.raws.size(), " raws");
  for (const Tensors* prior : {&in.prior_mus, &in.prior_logvars}) {
    TORCH_CHECK_VALUE(prior->empty() || prior->size() == n, "vaefast: ", n, " mus but ", prior->size(), " priors");
  }
  for (const Tensor& mu : in.mus) {
    TORCH_CHECK_VALUE(mu.device() == in.mus[0].device(), "vaefast: tensors on ", mu.device(), " and ",
                      in.mus[0].device());
  }
  return n;
}

bool is_wide(const MultiInputs& in) {
  const auto any_double = [](const Tensors& list) {
    return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return is_double(t); });
  };
  return any_double(in.mus) || any_double(in.raws) || any_double(in.prior_mus) || any_double(in.prior_logvars);
}

void check_samples(const MultiInputs& in, Reduction r) {
  if (r == Reduction::kSum) return;
  TORCH_CHECK_VALUE(r == Reduction::kPerSample || r == Reduction::kBatchMean,
                    "vaefast: KLs of tensors of other shapes add up per sample, or to one sum");
  for (const Tensor& mu : in.mus) {
    TORCH_CHECK_VALUE(mu.dim() > 0 && mu.sym_size(0) == in.mus[0].sym_size(0), "vaefast: batches differ");
  }
}

// All problems at once; where they have sums, these have one place in common.
void run_all(const Tensor& on, std::vector<PosteriorProblem>& problems) {
  const bool wide = std::any_of(problems.begin(), problems.end(), [](const PosteriorProblem& p) { return p.wide; });
  for (PosteriorProblem& p : problems) p.wide = wide;
  Job job;
  job.posterior = problems.data();
  job.posteriors = int64_t(problems.size());
  run(on, job);
}

void give_counters(Philox& philox, Counters& counters, const Tensor& sample) {
  philox.offset_add += uint64_t(counters.take(sample)) << philox.offset_shift;
}

int64_t words_for(const Tensors& samples) {
  Counters counters;
  for (const Tensor& t : samples) counters.take(t);
  return 4 * counters.taken();
}

// The gradients of every posterior in the making, none where the mask is empty. PosteriorGradients refer to what they
// are computed from; here is its home.
class MultiGradients {
 public:
  MultiGradients(const Tensors& dz, const MaybeTensor& dkl, const MultiInputs& in, const MaybeTensor& seed,
                 const PosteriorSpec& spec, const Asked& asked, const Mask& mask) {
    const size_t n = mask.empty() ? 0 : in.mus.size();
    inputs_.reserve(n), calls_.reserve(n), dz_.reserve(n), masks_.reserve(n), grads_.reserve(n);
    for (size_t k = 0; k < n; ++k) {
      inputs_.push_back(posterior_at(in, k));
      calls_.push_back({inputs_[k], {c10::nullopt, seed}, spec, asked});
      dz_.push_back(dz.empty() ? MaybeTensor() : MaybeTensor(dz[k]));
      masks_.emplace_back(mask.begin() + 4 * k, mask.begin() + 4 * k + 4);
      grads_.emplace_back(dz_[k], dkl, calls_[k], masks_[k]);
    }
  }
  MultiGradients(const MultiGradients&) = delete;

  const PosteriorGradients& operator[](size_t k) const { return grads_[k]; }

  void finish(Tensors& result) {
    for (PosteriorGradients& g : grads_) {
      for (Tensor& t : g.finish()) result.push_back(std::move(t));
    }
  }

 private:
  std::vector<PosteriorInputs> inputs_;
  std::vector<PosteriorCall> calls_;
  std::vector<MaybeTensor> dz_;
  std::vector<Mask> masks_;
  std::vector<PosteriorGradients> grads_;
};

}  // namespace

PosteriorInputs posterior_at(const MultiInputs& in, size_t k) {
  const auto prior = [k](const Tensors& list) { return list.empty() ? MaybeTensor() : MaybeTensor(list[k]); };
  return {in.mus[k], in.raws[k], prior(in.prior_mus), in.prior_mu, prior(in.prior_logvars), in.prior_logvar};
}

Tensors multi_forward(const MultiInputs& in, const MaybeTensor& given_seed, const MaybeGenerator& generator,
                      const PosteriorSpec& spec, const Asked& asked, const Mask& mask) {
  const size_t n = check_lists(in);
  TORCH_CHECK_VALUE(mask.empty() || (mask.size() == 4 * n && !asked.sample),
                    "vaefast: the mask has four entries a posterior, and keeps a KL's gradients alone");
  if (asked.kl) check_samples(in, spec.reduced.kind);
  const Tensor& on = in.mus[0];
  PosteriorOutputs out;
  Tensor seed;
  if (asked.kl) out.kl = empty_sum(on, spec.reduced, is_wide(in));
  if (asked.sample && !given_seed) seed = fresh({2}, on.options().dtype(at::kLong));

  Philox philox;
  if (seed.defined() && !no_compute(on)) {
    device_for(on.device().type()).philox(generator, words_for(in.mus), seed, philox);
  }
  const bool apart = !mask.empty() && !no_compute(on) && !device_for(on.device().type()).both;
  const MaybeTensor none;
  MultiGradients grads({}, none, in, none, spec, asked, mask);
  Tensors result;
  std::vector<PosteriorProblem> problems, gradients;
  problems.reserve(n);
  Counters counters;
  bool saved = false;  // the seed, by the first that draws at all
  for (size_t k = 0; k < n; ++k) {
    if (asked.sample) {
      out.z = fresh_like(in.mus[k]);
      result.push_back(out.z);
    }
    if (no_compute(on)) continue;
    if (mask.empty() || apart) {
      const PosteriorInputs one = posterior_at(in, k);
      Noise noise;
      if (asked.sample) noise.seed = given_seed ? *given_seed : seed;
      problems.push_back(forward_problem({one, noise, spec, asked}, out));
    } else {
      problems.push_back(grads[k].problem(1.0, out.kl));
    }
    if (apart) gradients.push_back(grads[k].problem(1.0));
    if (asked.sample) {
      Philox& own = problems[k].philox;
      if (seed.defined()) {
        std::copy(own.stride, own.stride + kMaxDims, philox.stride);
        philox.linear = own.linear;
        philox.on = true;
        own = philox;
        if (saved || in.mus[k].numel() == 0) own.save = nullptr;
        saved = saved || own.save;
      }
      give_counters(own, counters, in.mus[k]);
    }
  }
  if (!no_compute(on)) run_all(on, problems);
  if (apart) run_all(on, gradients);

  if (asked.kl) result.push_back(out.kl);
  if (seed.defined()) result.push_back(seed);
  grads.finish(result);
  return result;
}

Tensors multi_backward(const Tensors& dzs, const MaybeTensor& dkl, const MultiInputs& in, const MaybeTensor& seed,
                       const PosteriorSpec& spec, const Mask& mask) {
  const size_t n = check_lists(in);
  TORCH_CHECK_VALUE(mask.size() == 4 * n, "vaefast: the mask has four entries a posterior");
  TORCH_CHECK_VALUE(dzs.empty() || dzs.size() == n, "vaefast: ", n, " samples but ", dzs.size(), " gradients");
  TORCH_CHECK_VALUE(!dzs.empty() || dkl, "vaefast: backward without any incoming gradient");
  const Asked reached{!dzs.empty(), dkl.has_value()};
  const Tensor& on = in.mus[0];

  MultiGradients grads(dzs, dkl, in, seed, spec, reached, mask);
  if (!no_compute(on)) {
    std::vector<PosteriorProblem> problems;
    problems.reserve(n);
    Counters counters;
    for (size_t k = 0; k < n; ++k) {
      problems.push_back(grads[k].problem(1.0));
      if (reached.sample) give_counters(problems[k].philox, counters, in.mus[k]);
    }
    run_all(on, problems);
  }
  Tensors result;
  grads.finish(result);
  return result;
}

}  // namespace vaefast
