// Every kernel that csrc/cuda/run.cuh launches with arithmetic in VAEFAST_ARITHMETIC or, on the plain path, with
// operands of VAEFAST_PLAIN, without torch: what a change of the kernels does to their machine code is seen in a
// minute, for one architecture. test_cuda_build.py compares the list with the library's.

#include "cuda/list.cuh"
#include "cuda/plain.cuh"
#include "likelihoods.h"

namespace vaefast {

// A kernel that host code takes the address of is compiled.
template <class T, class Rec, class Post>
const void* one() {
  return reinterpret_cast<const void*>(job_kernel<T, Rec, Post>);
}

template <class T, class Rec>
void with_kl(const void** out) {
  out[0] = one<T, Rec, PosteriorForward<T, false, true>>();
  out[1] = one<T, Rec, PosteriorBackward<T, false, true>>();
}

template <class T, class L, int NP>
void params(const void** out) {
  with_kl<T, Reconstruction<T, L, NP>>(out);
  if constexpr (NP > L::required) params<T, L, NP - 1>(out);
}

template <class T, class... Ss>
void classes(TypeList<Ss...>, const void** out) {
  (with_kl<T, ClassWork<T, Ss>>(out), ...);
}

template <class T, class L, int C>
void mixture(const void** out) {
  if constexpr (kComponentParams<L, C> > 0) {
    with_kl<T, Mixture<T, L, C>>(out);
  } else {
    classes<T>(TypeList<float, __half, __nv_bfloat16>{}, out);
    if constexpr (sizeof(T) == 8) classes<T>(TypeList<double>{}, out);
  }
}

template <class T, class L, int... Cs>
void channels(Counts<Cs...>, const void** out) {
  (mixture<T, L, Cs>(out), ...);
}

template <class T, class L>
void reconstruction(const void** out) {
  if constexpr (kMixture<L>) {
    channels<T, L>(typename L::Channels{}, out);
  } else {
    params<T, L, L::params>(out);
  }
}

template <class T, class... Ls>
void reconstructions(TypeList<Ls...>, const void** out) {
  (reconstruction<T, Ls>(out), ...);
}

template <class T, class Post>
void alone_and_listed(const void** out) {
  out[0] = one<T, Nothing, Post>();
  out[1] = reinterpret_cast<const void*>(list_kernel<T, Post>);
}

template <class T, template <class, bool, bool> class Work>
void posteriors(const void** out) {
  alone_and_listed<T, Work<T, true, false>>(out);
  alone_and_listed<T, Work<T, true, true>>(out);
  alone_and_listed<T, Work<T, false, true>>(out);
}

template <class S, class L, int NP>
void plain_params(const void** out) {
  using Rec = PlainReconstruction<S, L, NP>;
  out[0] = one<float, Rec, PlainForward<S, false, true>>();
  if constexpr (std::is_same_v<S, __half>) out[1] = one<float, Rec, PlainBackward<S, false, true>>();
  if constexpr (NP > L::required) plain_params<S, L, NP - 1>(out);
}

template <class S, class L>
void plain_reconstruction(const void** out) {
  if constexpr (!kMixture<L>) plain_params<S, L, L::params>(out);
}

template <class S, template <class, bool, bool> class Work>
void plain_posteriors(const void** out) {
  out[0] = one<float, Nothing, Work<S, true, false>>();
  out[1] = one<float, Nothing, Work<S, true, true>>();
  out[2] = one<float, Nothing, Work<S, false, true>>();
}

template <class S, class... Ls>
void plain(TypeList<Ls...>, const void** out) {
  (plain_reconstruction<S, Ls>(out), ...);
  out[0] = one<float, PlainRescale<S>, PlainBackward<S, false, true>>();
  plain_posteriors<S, PlainForward>(out);
  plain_posteriors<S, PlainBackward>(out);
}

#if defined(VAEFAST_PLAIN)
void all(const void** out) { plain<VAEFAST_PLAIN>(Likelihoods{}, out); }
#else
void all(const void** out) {
  using T = VAEFAST_ARITHMETIC;
  reconstructions<T>(Likelihoods{}, out);
  out[0] = one<T, Rescale<T>, PosteriorBackward<T, false, true>>();
  posteriors<T, PosteriorForward>(out);
  posteriors<T, PosteriorBackward>(out);
  out[0] = reinterpret_cast<const void*>(finish_kernel<T>);
}
#endif

}  // namespace vaefast
