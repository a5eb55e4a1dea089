// Cuts problems into blocks, finds scratch memory, picks the kernel and launches it on the caller's stream. One unit
// includes this for each arithmetic type, so that they compile side by side.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "cuda/grid.cuh"
#include "cuda/kernel.cuh"
#include "problem.h"

namespace vaefast {

// A counter that is 0 between launches, for one launch at a time on this stream.
unsigned* counter_for(const at::Tensor& on, cudaStream_t stream);

template <class T>
void run_typed(const at::Tensor& on, const Job& job, cudaStream_t stream);

#define VF_TYPED(EXTERN, T) EXTERN template void run_typed<T>(const at::Tensor&, const Job&, cudaStream_t);

VF_TYPED(extern, float)
VF_TYPED(extern, double)

template <class T, class Rec, class Post>
void launch(const Launch& a, cudaStream_t stream) {
  start(job_kernel<T, Rec, Post>, a.rec.blocks + a.post.blocks, kThreads, stream, a);
}

// A reconstruction comes with a KL or its gradients, of which there may be none.
template <class T, class Rec>
void launch_with_kl(const Launch& a, cudaStream_t stream) {
  a.posterior.backward ? launch<T, Rec, PosteriorBackward<T, false, true>>(a, stream)
                       : launch<T, Rec, PosteriorForward<T, false, true>>(a, stream);
}

template <class T, class L, int NP>
void launch_params(const Launch& a, cudaStream_t stream) {
  if (a.reconstruction.nparams == NP) return launch_with_kl<T, Reconstruction<T, L, NP>>(a, stream);
  if constexpr (NP > L::required) launch_params<T, L, NP - 1>(a, stream);
}

template <class T>
void launch_reconstruction(const Launch& a, cudaStream_t stream) {
  if (a.reconstruction.kept) return launch<T, Rescale<T>, PosteriorBackward<T, false, true>>(a, stream);
  visit(a.reconstruction.likelihood, Likelihoods{}, [&](auto tag) {
    using L = typename decltype(tag)::type;
    if constexpr (kMixture<L>) {
      visit(a.reconstruction.channels, typename L::Channels{},
            [&](auto channels) { launch_with_kl<T, Mixture<T, L, decltype(channels)::value>>(a, stream); });
    } else {
      launch_params<T, L, L::params>(a, stream);
    }
  });
}

template <class T, template <class, bool, bool> class Work>
void launch_posterior(const Launch& a, cudaStream_t stream) {
  const PosteriorProblem& p = a.posterior;
  if (!p.kl) return launch<T, Nothing, Work<T, true, false>>(a, stream);
  return p.sample ? launch<T, Nothing, Work<T, true, true>>(a, stream)
                  : launch<T, Nothing, Work<T, false, true>>(a, stream);
}

// Decides how the loops reach each operand, and how they move them all. The first `full` operands are as large as the
// space where they are there at all.
template <class T>
void set_access(Space& space, size_t full, const std::vector<Operand*>& operands) {
  const int last = space.ndim - 1;
  const int64_t columns = space.size[last];
  const auto in_packs = [](int64_t n) { return n % kPack<T> == 0; };
  const auto all = [](const int64_t* begin, const int64_t* end, auto f) { return std::all_of(begin, end, f); };
  bool packed = true, plain = space.numel <= 0x7fffffff && in_packs(space.rows ? space.numel / space.rows : 0);
  const Operand* linear = nullptr;
  for (size_t k = 0; k < operands.size(); ++k) {
    Operand* op = operands[k];
    if (!op->data) {
      op->access = Access::kConstant;
      continue;
    }
    const int64_t *stride = op->stride, *outer = stride + last;
    const bool scalar = space.numel > 1 && all(stride, outer + 1, [](int64_t s) { return s == 0; });
    const bool row_scalar = !scalar && !op->linear && *outer == 0 && in_packs(columns);
    const int64_t skip = scalar || op->linear ? 0 : (stride[0] - (row_scalar ? 0 : columns)) * size_of(op->dtype);
    op->skip = uint32_t(skip);
    plain = plain && (scalar || op->linear || (last == 1 && op->skip == skip));
    space.views = space.views || !(scalar || op->linear);
    if (scalar || row_scalar) {
      op->access = scalar ? Access::kScalar : Access::kRowScalar;
      plain = plain && k >= full && op->dtype == DType::kFloat;
      continue;
    }
    op->access = op->linear ? Access::kLinear : Access::kView;
    if (!linear) linear = op;
    plain = plain && op->dtype == linear->dtype && op->dtype != DType::kBool;
    const bool aligned = reinterpret_cast<uintptr_t>(op->data) % (size_of(op->dtype) * kPack<T>) == 0;
    packed = packed && aligned && (op->linear || (*outer == 1 && in_packs(columns) && all(stride, outer, in_packs)));
  }
  if (!packed) return;
  space.moves = Moves::kPacked;
  if (!plain || !linear) return;
  space.moves = linear->dtype == DType::kFloat  ? Moves::kPlain
                : linear->dtype == DType::kHalf ? Moves::kPlainHalf
                                                : Moves::kPlainBFloat16;
  // m = 2^(32 + shift) / columns, rounded up, with 2^(shift + 1) the power of two that holds columns: exact for 31 bits
  // (Granlund & Montgomery 1994, theorem 4.2)
  while (columns > int64_t(2) << space.shift) ++space.shift;
  space.reciprocal = uint32_t(((uint64_t(1) << (32 + space.shift)) + uint64_t(columns) - 1) / uint64_t(columns));
}

template <class T>
void set_access(ReconstructionProblem& p) {
  std::vector<Operand*> operands{&p.target};
  for (Operand& param : p.param) operands.push_back(&param);
  operands.insert(operands.end(), {&p.weight, &p.upstream, &p.out_nll});
  for (Operand& grad : p.out_grad) operands.push_back(&grad);
  set_access<T>(p.space, 1 + kMaxParams, operands);
}

template <class T>
void set_access(PosteriorProblem& p) {
  set_access<T>(p.space, 4,
                {&p.mu, &p.raw, &p.eps, &p.dz, &p.prior_mu, &p.prior_logvar, &p.dkl, &p.out_z, &p.out_kl, &p.out_dmu,
                 &p.out_draw, &p.out_dprior_mu, &p.out_dprior_logvar});
  if (p.philox.on && !p.philox.linear) {
    p.space.views = true;
    p.space.moves = Moves::kSingle;
  }
}

template <class T>
void run_typed(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  Launch a;
  if (job.reconstruction) {
    a.reconstruction = *job.reconstruction;
    set_access<T>(a.reconstruction);
    Space& space = a.reconstruction.space;
    const bool sites = a.reconstruction.planes > 1;
    if (sites) space.moves = Moves::kSingle;
    a.rec = sites ? geometry_of<T>(space, 1) : geometry_of<T>(space);
  }
  if (job.posterior) {
    a.posterior = *job.posterior;
    set_access<T>(a.posterior);
    a.post = geometry_of<T>(a.posterior.space);
  }
  a.total = job.total;
  a.beta = job.beta;
  const auto adds_up = [](const Sum& sum, const Geometry& g) { return sum.out && g.per_row != 1; };
  Sum &rec = a.reconstruction.sum, &post = a.posterior.sum;
  at::Tensor partial;
  if (a.total || adds_up(rec, a.rec) || adds_up(post, a.post)) {
    partial = at::empty({int64_t(a.rec.count) + a.post.count}, on.options().dtype(at::kDouble));
    rec.partial = partial.mutable_data_ptr<double>();
    post.partial = rec.partial + a.rec.count;
    a.counter = counter_for(on, stream);
    // a sum over nothing is a block's work too
    if (a.rec.blocks + a.post.blocks == 0) (job.reconstruction ? a.rec : a.post).blocks = 1;
  }
  if (a.rec.blocks + a.post.blocks == 0) return;
  if (job.reconstruction) return launch_reconstruction<T>(a, stream);
  a.posterior.backward ? launch_posterior<T, PosteriorBackward>(a, stream)
                       : launch_posterior<T, PosteriorForward>(a, stream);
}

inline void run_on(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  const bool wide = job.posterior ? job.posterior->wide : job.reconstruction->wide;
  wide ? run_typed<double>(on, job, stream) : run_typed<float>(on, job, stream);
}

}  // namespace vaefast
