// Cuts problems into blocks, finds scratch memory, picks the kernel and launches it on the caller's stream. One unit
// includes this for each arithmetic type, so that they compile side by side.
#pragma once

#include <ATen/ATen.h>

#include "cuda/grid.cuh"
#include "cuda/kernel.cuh"
#include "problem.h"

namespace vaefast {

// A counter that is 0 between launches.
at::Tensor counter_for(const at::Tensor& on, cudaStream_t stream);

template <class T>
void run_typed(const at::Tensor& on, const Job& job, cudaStream_t stream);

// kept *= upstream for a 0-d upstream; kept is dense.
template <class T>
void scale_typed(const at::Tensor& kept, const at::Tensor& upstream, cudaStream_t stream);

#define VF_TYPED(EXTERN, T)                                                       \
  EXTERN template void run_typed<T>(const at::Tensor&, const Job&, cudaStream_t); \
  EXTERN template void scale_typed<T>(const at::Tensor&, const at::Tensor&, cudaStream_t);

VF_TYPED(extern, float)
VF_TYPED(extern, double)

template <class T, class Rec, class Post>
void launch(const Launch& a, cudaStream_t stream) {
  start(job_kernel<T, Rec, Post>, a.rec.blocks + a.post.blocks, kThreads, stream, a);
}

template <class T, class Rec>
void launch_elbo(const Launch& a, cudaStream_t stream) {
  launch<T, Rec, PosteriorForward<T, false, true>>(a, stream);
}

template <class T, class L, int NP>
void launch_params(const Launch& a, bool elbo, cudaStream_t stream) {
  if (a.reconstruction.nparams == NP) {
    using Rec = Reconstruction<T, L, NP>;
    return elbo ? launch_elbo<T, Rec>(a, stream) : launch<T, Rec, Nothing>(a, stream);
  }
  if constexpr (NP > L::required) launch_params<T, L, NP - 1>(a, elbo, stream);
}

template <class T, class L, class... Rest>
void launch_reconstruction(int kind, const Launch& a, bool elbo, cudaStream_t stream, TypeList<L, Rest...>) {
  if (kind == 0) return launch_params<T, L, L::params>(a, elbo, stream);
  if constexpr (sizeof...(Rest) > 0) launch_reconstruction<T>(kind - 1, a, elbo, stream, TypeList<Rest...>{});
}

template <class T, template <class, bool, bool> class Work>
void launch_posterior(const Launch& a, cudaStream_t stream) {
  const PosteriorProblem& p = a.posterior;
  if (!p.kl) return launch<T, Nothing, Work<T, true, false>>(a, stream);
  return p.sample ? launch<T, Nothing, Work<T, true, true>>(a, stream)
                  : launch<T, Nothing, Work<T, false, true>>(a, stream);
}

template <class T>
void run_typed(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  Launch a;
  if (job.reconstruction) {
    a.reconstruction = *job.reconstruction;
    a.rec = geometry_of<T>(job.reconstruction->space);
  }
  if (job.posterior) {
    a.posterior = *job.posterior;
    a.post = geometry_of<T>(job.posterior->space);
  }
  a.total = job.total;
  a.beta = job.beta;
  at::Tensor partial, counter;
  Sum &rec = a.reconstruction.sum, &post = a.posterior.sum;
  if (rec.out || post.out) {
    // at least one element, so that a sum over nothing is finished too
    partial = at::empty({a.rec.count + a.post.count + 1}, on.options().dtype(at::kDouble));
    if (rec.out) rec.partial = partial.mutable_data_ptr<double>();
    if (post.out) post.partial = partial.mutable_data_ptr<double>() + a.rec.count;
    counter = counter_for(on, stream);
    a.counter = reinterpret_cast<unsigned*>(counter.mutable_data_ptr<int32_t>());
    if (a.rec.blocks + a.post.blocks == 0) (job.reconstruction ? a.rec : a.post).blocks = 1;
  }
  if (a.rec.blocks + a.post.blocks == 0) return;
  if (job.reconstruction) {
    return launch_reconstruction<T>(a.reconstruction.likelihood, a, job.posterior != nullptr, stream, Likelihoods{});
  }
  a.posterior.backward ? launch_posterior<T, PosteriorBackward>(a, stream)
                       : launch_posterior<T, PosteriorForward>(a, stream);
}

template <class T>
void scale_typed(const at::Tensor& kept, const at::Tensor& upstream, cudaStream_t stream) {
  Space space;
  space.size[0] = space.numel = kept.numel();
  Operand to, by;
  to.data = kept.mutable_data_ptr();
  to.dtype = dtype_of(kept);
  by.data = const_cast<void*>(upstream.const_data_ptr());
  by.dtype = dtype_of(upstream);
  to.linear = by.linear = true;
  const int64_t share = int64_t(kThreads) * kPack<T> * kPacksPerThread;
  const int64_t blocks = (space.numel + share - 1) / share;
  if (blocks > 0) start(scale_kernel<T>, blocks, kThreads, stream, to, space, by);
}

inline void run_on(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  const bool wide = job.posterior ? job.posterior->wide : job.reconstruction->wide;
  wide ? run_typed<double>(on, job, stream) : run_typed<float>(on, job, stream);
}

inline void scale_on(const at::Tensor& kept, const at::Tensor& upstream, cudaStream_t stream) {
  if (upstream.dim() != 0 || !kept.is_non_overlapping_and_dense()) {
    at::Tensor(kept).mul_(upstream);
    return;
  }
  kept.scalar_type() == at::kDouble ? scale_typed<double>(kept, upstream, stream)
                                    : scale_typed<float>(kept, upstream, stream);
}

}  // namespace vaefast
