// The host's side of what is no part of a job: scratch memory for its sums, and its launch, on the caller's stream.
#pragma once

#include "cuda/categorical.cuh"
#include "cuda/log_ratio.cuh"
#include "cuda/mixture_density.cuh"
#include "cuda/run.cuh"

namespace vaefast {

// Instantiated in units of their own, launch_latents.cuh.
template <class T>
void launch(const Alone<CategoricalProblem>& a, cudaStream_t stream);
template <class T>
void launch(const Alone<LogRatioRows>& a, cudaStream_t stream);
template <class T>
void launch_backward(const LogRatioProblem& p, cudaStream_t stream);
template <class T>
void launch(const ExpertsProblem& p, cudaStream_t stream);
template <class T>
void launch(const MarginalsProblem& p, cudaStream_t stream);
template <class T>
void launch(const MixtureLaunch& a, cudaStream_t stream);

template <class T, class Problem>
void run_alone(const at::Tensor& on, Alone<Problem> a, int64_t rows, cudaStream_t stream) {
  Sum& sum = a.problem.sum;
  const bool adds_up = sum.out && a.cut.per_row != 1, apart = adds_up && rows > kRowsOfOneBlock;
  at::Tensor partial;
  if (adds_up) {
    partial = at::empty({int64_t(a.cut.count)}, on.options().dtype(at::kDouble));
    sum.partial = partial.mutable_data_ptr<double>();
    a.rows = uint32_t(rows);
    if (!apart) {
      a.counter = counter_for(on, stream);
      // a sum over nothing is a block's work too
      a.cut.blocks = std::max<int64_t>(a.cut.blocks, 1);
    }
  }
  if (a.cut.blocks > 0) launch<T>(a, stream);
  if (!apart) return;
  Launch last;
  last.posterior.sum = sum;
  last.post = a.cut;
  last.rows = uint32_t(rows);
  launch_finish<T>(last, stream);
}

template <class T>
void run_typed(const at::Tensor& on, CategoricalProblem p, cudaStream_t stream) {
  set_access<T>(p.space, 0,
                {&p.logits, &p.prior, &p.dz, &p.dkl, &p.uniforms, &p.out_z, &p.out_kl, &p.out_dlogits, &p.out_dprior});
  p.space.moves = Moves::kSingle;
  const Geometry g = cut<T>(p.space, 4, kMaxUnits, 1 << log_team_of(p));
  run_alone<T>(on, Alone<CategoricalProblem>{p, g}, p.space.rows, stream);
}

template <class T>
void run_typed(const at::Tensor& on, const LogRatioProblem& p, cudaStream_t stream) {
  if (p.backward) {
    if (p.samples * p.latents > 0) launch_backward<T>(p, stream);
    return;
  }
  Space rows;
  rows.rows = p.draws * p.samples;
  rows.numel = rows.rows * p.latents;
  LogRatioRows ratios{p};
  ratios.sum.out = p.ratio;
  ratios.sum.scale = 0.5;
  run_alone<T>(on, Alone<LogRatioRows>{ratios, cut<T>(rows, least_of<T>(rows, ratios.sum))}, rows.rows, stream);
}

template <class T>
void run_typed(const at::Tensor&, const ExpertsProblem& p, cudaStream_t stream) {
  if (p.columns > 0) launch<T>(p, stream);
}

template <class T>
void run_typed(const at::Tensor&, const MarginalsProblem& p, cudaStream_t stream) {
  launch<T>(p, stream);
}

template <class T>
void run_typed(const at::Tensor& on, const MixtureProblem& p, cudaStream_t stream) {
  constexpr int64_t kShares = 1 << 19;  // that are kept, but for one sample's
  const int64_t K = p.components, D = p.latents, together = std::clamp<int64_t>(kShares / K, 1, p.samples);
  MixtureLaunch a{p};
  while (a.log_team < 5 && (1 << a.log_team) < D) ++a.log_team;
  const int64_t numbers = 2 * K * D + K + 2, of_samples = p.backward ? together * K + p.sums() : 0;
  const at::Tensor scratch = at::empty({numbers + of_samples}, on.options().dtype(at::kDouble));
  double* next = scratch.mutable_data_ptr<double>();
  const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
  a.mu = take(K * D), a.root = take(K * D), a.constant = take(K), a.weights = take(2);
  if (p.backward) a.shares = take(together * K), a.sums = take(p.sums());
  const auto run = [&](MixtureStep step) {
    a.step = step;
    launch<T>(a, stream);
  };
  if (p.logits) run(MixtureStep::kWeights);
  run(MixtureStep::kComponents);
  for (a.first = 0; a.first < p.samples; a.first += a.count) {
    a.count = std::min(together, p.samples - a.first);
    run(MixtureStep::kSamples);
    if (p.backward) run(MixtureStep::kSums);
  }
  if (p.backward && (D > 0 || p.dlogits)) run(MixtureStep::kCollect);
}

template <class Problem>
void run_on(const at::Tensor& on, const Problem& p, cudaStream_t stream) {
  p.wide ? run_typed<double>(on, p, stream) : run_typed<float>(on, p, stream);
}

}  // namespace vaefast
