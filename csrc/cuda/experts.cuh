// Products of experts: a thread has a column, and goes through its experts for the least log variance, for the weights
// and backward for the gradients. No torch types here.
#pragma once

#include "cuda/units.cuh"
#include "experts.h"

namespace vaefast {

template <class T, bool PRIOR, bool MASKED>
class Column {
 public:
  __device__ Column(const ExpertsProblem& p, int64_t at)
      : p_(p), at_(at), row_(MASKED ? at / (p.columns / p.rows) : 0) {
    for (int64_t m = 0; m < p.experts; ++m) {
      const T x = logvar(m);
      least_ = m == 0 || x < least_ ? x : least_;
    }
    for (int64_t m = 0; m < p.experts; ++m) {
      const T w = weight(m);
      sum_ += w;
      mean_ = fma_(w, there(m) ? mu(m) : T(0), mean_);
    }
    of_prior_ = weight_of_prior<PRIOR>(least_);
  }

  __device__ void forward() const {
    static_cast<T*>(p_.mu)[at_] = mean_ / (sum_ + of_prior_);
    static_cast<T*>(p_.logvar)[at_] = product_logvar<PRIOR, MASKED>(sum_, least_, of_prior_);
  }

  __device__ void backward() const {
    const T share = T(1) / (sum_ + of_prior_), mean = mean_ * share;
    const T dmu = p_.dmu ? static_cast<const T*>(p_.dmu)[at_] : T(0);
    const T dlogvar = p_.dlogvar ? static_cast<const T*>(p_.dlogvar)[at_] : T(0);
    for (int64_t m = 0; m < p_.experts; ++m) {
      const bool here = there(m);
      const T own = here ? weight(m) * share : T(0);
      if (p_.dmus) static_cast<T*>(p_.dmus)[element(m)] = here ? own * dmu : T(0);
      if (!p_.dlogvars) continue;
      static_cast<T*>(p_.dlogvars)[element(m)] = here ? own * fma_(mean - mu(m), dmu, dlogvar) : T(0);
    }
  }

 private:
  __device__ int64_t element(int64_t m) const { return m * p_.columns + at_; }
  __device__ bool there(int64_t m) const { return !MASKED || p_.there[m * p_.rows + row_]; }
  __device__ T mu(int64_t m) const { return static_cast<const T*>(p_.mus)[element(m)]; }
  __device__ T logvar(int64_t m) const {
    return there(m) ? static_cast<const T*>(p_.logvars)[element(m)] : lit<T>(kMissing);
  }
  __device__ T weight(int64_t m) const { return exp_(least_ - logvar(m)); }

  const ExpertsProblem& p_;
  const int64_t at_, row_;
  T least_ = 0, sum_ = 0, mean_ = 0, of_prior_ = 0;
};

template <class T, bool PRIOR, bool MASKED>
__global__ void __launch_bounds__(kThreads) experts_kernel(const __grid_constant__ ExpertsProblem p) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.columns) return;
  const Column<T, PRIOR, MASKED> column(p, at);
  p.backward ? column.backward() : column.forward();
}

}  // namespace vaefast
