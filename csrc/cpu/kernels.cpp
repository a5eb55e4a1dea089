// What a SIMD unit offers, and the way to its loops; compiled once per instruction set, as they are.
//
// The way of an operation, by the example of elbo_loss(recon, x, mu, logvar) of float32:
//
//   1. operators/elbo.cpp puts what it was given into two problems (problems.h), plain data: a ReconstructionProblem
//      with recon and x as operands, the gradient of recon and the sum as what is to be written, and a
//      PosteriorProblem.
//   2. cpu/launch.cpp cuts each problem into units and hands stretches of them, [begin, end), to threads: here to
//      reconstruction() and posterior(), the two functions that this file gives out.
//   3. What is the same for all elements is decided once, outside the loops, by visit() and by templates: the
//      arithmetic type (reconstruction_typed), the likelihood's group, which is compiled in run_binary.cpp, the
//      likelihood (Bernoulli), how many parameters were given (reconstruction_params), whether a gradient is wanted
//      (reconstruction_units). So there is a loop for each combination.
//   4. for_units() walks through a unit by tiles of 1,024 elements. reconstruction_tile<float, Bernoulli, 1, true,
//      true> is such a loop: read() gives recon's and x's tile as contiguous floats, in place or brought into a buffer
//      (run_copies.cpp); for_vectors() takes a vector of each, eval_term<Bernoulli> of likelihoods/ computes loss and
//      gradient, sum.add() and put() take them; write_back() stores what could not be written in place.
//   5. Each unit's sum goes to its place in `partial`, and launch.cpp adds those up in a fixed order.
//
// A likelihood or a parameterization comes into step 3 by its type list and into step 4 as a functor: no line here
// names one.

#include "cpu/kernels.h"

#include "cpu/runs.h"
#include "cpu/tile.h"
#include "likelihoods.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

void posterior(const PosteriorProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_posterior<double>(p, begin, end) : run_posterior<float>(p, begin, end);
}

// Gradients that an earlier call left, times upstream: where that is one number for all of them, without copies of it.
template <class T>
double rescale_tile(const ReconstructionProblem& p, const Tile& t) {
  Buffer<T> upstream_buffer, grad_buffer, out_buffer;
  const int last = t.space.ndim - 1;
  const bool one = p.upstream.stride[last] == 0 && t.start % t.space.size[last] + t.n <= t.space.size[last];
  const T* upstream = read(p.upstream, one ? Tile{t.space, t.start, 1} : t, upstream_buffer);
  for (int k = 0; k < p.nparams; ++k) {
    const T* grad = read(p.out_grad[k], t, grad_buffer);
    T* out = writable(p.out_grad[k], t, out_buffer);
    if (one) {
      const Wide<T> factor(*upstream);
      for_vectors<T>(t.n, [&](int i) { put(out, i, at(grad, i) * factor); });
    } else {
      for_vectors<T>(t.n, [&](int i) { put(out, i, at(grad, i) * at(upstream, i)); });
    }
    write_back(p.out_grad[k], t, out_buffer);
  }
  return 0;
}

template <class T>
void reconstruction_typed(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  if (!p.kept) {
    return visit_group(p.likelihood, LikelihoodGroups{},
                       [&](auto group, int index) { run_reconstruction<T, decltype(group)>(index, p, begin, end); });
  }
  const auto body = [&](const Tile& t) { return rescale_tile<T>(p, t); };
  for_units(p.space, nullptr, kUnit, kTile, begin, end, body, kLanes<T>, false);
}

void reconstruction(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  p.wide ? reconstruction_typed<double>(p, begin, end) : reconstruction_typed<float>(p, begin, end);
}

void marginals(const MarginalsProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_marginals<double>(p, begin, end) : run_marginals<float>(p, begin, end);
}

void categorical(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_categorical<double>(p, begin, end) : run_categorical<float>(p, begin, end);
}

void log_ratio(const LogRatioProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_log_ratio<double>(p, begin, end) : run_log_ratio<float>(p, begin, end);
}

void experts(const ExpertsProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_experts<double>(p, begin, end) : run_experts<float>(p, begin, end);
}

void ivon(const IvonProblem& p, int64_t begin, int64_t end) {
  p.wide ? run_ivon<double>(p, begin, end) : run_ivon<float>(p, begin, end);
}

}  // namespace
}  // namespace VF_ISA

#define VF_PASTE_(a, b) a##b
#define VF_PASTE(a, b) VF_PASTE_(a, b)

const CpuKernels& VF_PASTE(cpu_kernels_, CPU_CAPABILITY)() {
  static const CpuKernels kernels{posterior, reconstruction, marginals,   categorical,
                                  log_ratio, experts,        run_mixture, ivon};
  return kernels;
}

}  // namespace vaefast
