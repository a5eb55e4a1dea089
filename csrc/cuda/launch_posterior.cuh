// Launches of posteriors, by one and by the list, and of what is left to sum.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/launches.h"

namespace vaefast {

// f(Tag of the work that a posterior asks for)
template <class T, template <class, bool, bool> class Work, class F>
void visit_outputs(const PosteriorProblem& p, const F& f) {
  if (!p.kl) return f(Tag<Work<T, true, false>>{});
  p.sample ? f(Tag<Work<T, true, true>>{}) : f(Tag<Work<T, false, true>>{});
}

template <class T, class F>
void visit_posterior(const PosteriorProblem& p, const F& f) {
  p.backward ? visit_outputs<T, PosteriorBackward>(p, f) : visit_outputs<T, PosteriorForward>(p, f);
}

template <class T>
void launch_posterior(const Launch& a, cudaStream_t stream) {
  visit_posterior<T>(a.posterior, [&](auto work) {
    start(job_kernel<T, Nothing, typename decltype(work)::type>, a.post.blocks, kThreads, stream, a);
  });
}

template <class T>
void launch_list(const ListLaunch& a, int64_t blocks, cudaStream_t stream) {
  visit_posterior<T>(a.posterior, [&](auto work) {
    start(list_kernel<T, typename decltype(work)::type>, blocks, kThreads, stream, a);
  });
}

template <class T>
void launch_finish(const Launch& a, cudaStream_t stream) {
  start(finish_kernel<T>, (int64_t(a.rows) + kThreads - 1) / kThreads, kThreads, stream, a);
}

#define VF_POSTERIOR(T)                                                   \
  template void launch_posterior<T>(const Launch&, cudaStream_t);         \
  template void launch_list<T>(const ListLaunch&, int64_t, cudaStream_t); \
  template void launch_finish<T>(const Launch&, cudaStream_t);

}  // namespace vaefast
