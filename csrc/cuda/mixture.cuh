// A mixture's work: a site a thread, whose planes are read one by one. No torch types here.
#pragma once

#include "cuda/units.cuh"
#include "likelihoods/term.h"
#include "mixture.h"

namespace vaefast {

// The element of an operand at this offset, whatever its dtype.
template <class T>
__device__ inline T load_element(const Operand& op, int64_t offset) {
  if constexpr (sizeof(T) == 8) {
    if (op.dtype == DType::kDouble) return static_cast<const double*>(op.data)[offset];
  }
  if (op.dtype == DType::kFloat) return static_cast<const float*>(op.data)[offset];
  if (op.dtype == DType::kHalf) return load(static_cast<const __half*>(op.data)[offset]);
  return load(static_cast<const __nv_bfloat16*>(op.data)[offset]);
}

template <class T>
__device__ inline void store_element(const Operand& op, int64_t offset, T x) {
  if constexpr (sizeof(T) == 8) {
    if (op.dtype == DType::kDouble) return void(static_cast<double*>(op.data)[offset] = x);
  }
  if (op.dtype == DType::kFloat) {
    static_cast<float*>(op.data)[offset] = float(x);
  } else if (op.dtype == DType::kHalf) {
    static_cast<__half*>(op.data)[offset] = stored<__half>(x);
  } else {
    static_cast<__nv_bfloat16*>(op.data)[offset] = stored<__nv_bfloat16>(x);
  }
}

// Where a site's first plane is.
__device__ inline int64_t site_offset(const Operand& op, const Pack& at) {
  if (op.access == Access::kLinear) return at.start;
  return op.access == Access::kView || op.access == Access::kRowScalar ? view_offset(at, op.stride) : 0;
}

// What mixture_nll() asks of a site.
template <class T>
struct Site {
  using V = T;
  const ReconstructionProblem& p;
  int components_;
  int64_t param_, target_, grad_;
  T scale;

  __device__ int components() const { return components_; }
  __device__ T param(int plane) const { return load_element<T>(p.param[0], param_ + plane * p.param_step); }
  __device__ T target(int c) const { return load_element<T>(p.target, target_ + c * p.target_step); }
  __device__ bool grads() const { return p.grad; }
  // where the gradient's memory holds a T in full
  __device__ bool keeps() const {
    return p.grad && p.out_grad[0].dtype == (sizeof(T) == 8 ? DType::kDouble : DType::kFloat);
  }
  __device__ T& place(int plane) const { return static_cast<T*>(p.out_grad[0].data)[grad_ + plane * p.grad_step]; }
  __device__ void keep(int plane, T x) const { place(plane) = x; }
  __device__ T kept(int plane) const { return place(plane); }
  __device__ void grad(int plane, T g) const { put(plane, g * scale); }
  __device__ void put(int plane, T x) const { store_element(p.out_grad[0], grad_ + plane * p.grad_step, x); }
};

template <class T_, class L, int C>
struct Mixture {
  using T = T_;
  static constexpr bool kSums = true;

  template <class M>
  static __device__ T run(const ReconstructionProblem& p, const Unit& u, bool) {
    T sum = 0;
    for_packs<M>(p.space, u, [&](const Pack& at) {
      T weight[1], upstream[1], nll[1] = {};
      decode_optional<M>(p.weight, fetch_optional<T, M>(p.weight, at), weight);
      decode_optional<M>(p.upstream, fetch_optional<T, M>(p.upstream, at), upstream);
      const Site<T> site{p,
                         p.planes / (1 + kComponentParams<L, C>),
                         site_offset(p.param[0], at),
                         site_offset(p.target, at),
                         site_offset(p.out_grad[0], at),
                         lit<T>(p.grad_scale) * weight[0] * upstream[0]};
      if (weight[0] != T(0)) {
        nll[0] = weight[0] * mixture_nll<L, C>(site, site.components(), p.options);
      } else if (p.grad) {
        for (int plane = 0; plane < p.planes; ++plane) site.put(plane, T(0));
      }
      sum += nll[0];
      write<M>(p.out_nll, at, nll);
    });
    return sum;
  }
};

// Its elements go one by one.
template <class Work>
constexpr bool kMixtureWork = false;
template <class T, class L, int C>
constexpr bool kMixtureWork<Mixture<T, L, C>> = true;

}  // namespace vaefast
