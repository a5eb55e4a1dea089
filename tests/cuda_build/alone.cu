// The same of csrc/cuda/run_latents.cuh.

#include "cuda/categorical.cuh"
#include "cuda/experts.cuh"
#include "cuda/log_ratio.cuh"
#include "cuda/marginals.cuh"
#include "cuda/mixture_density.cuh"

namespace vaefast {

template <class T, bool MIXED>
void categorical(const void** out) {
  out[0] = reinterpret_cast<const void*>(alone_kernel<T, CategoricalWork<T, MIXED, false>>);
  out[1] = reinterpret_cast<const void*>(alone_kernel<T, CategoricalWork<T, MIXED, true>>);
}

template <class T, DrawPrior P>
void log_ratio(const void** out) {
  out[0] = reinterpret_cast<const void*>(alone_kernel<T, LogRatioWork<T, P>>);
  out[1] = reinterpret_cast<const void*>(log_ratio_backward_kernel<T, P>);
}

template <class T, bool PRIOR>
void experts(const void** out) {
  out[0] = reinterpret_cast<const void*>(experts_kernel<T, PRIOR, false>);
  out[1] = reinterpret_cast<const void*>(experts_kernel<T, PRIOR, true>);
}

void all(const void** out) {
  using T = VAEFAST_ARITHMETIC;
  categorical<T, false>(out);
  categorical<T, true>(out);
  log_ratio<T, DrawPrior::kNone>(out);
  log_ratio<T, DrawPrior::kStandard>(out);
  log_ratio<T, DrawPrior::kGiven>(out);
  experts<T, false>(out);
  experts<T, true>(out);
  out[0] = reinterpret_cast<const void*>(marginals_kernel<T>);
  out[1] = reinterpret_cast<const void*>(marginals_backward_kernel<T>);
  out[0] = reinterpret_cast<const void*>(mixture_kernel<T>);
}

}  // namespace vaefast
