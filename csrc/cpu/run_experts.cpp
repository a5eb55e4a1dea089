// Products of experts (ExpertsProblem), a stretch of columns after the other: expert by expert, first for the least log
// variance, then for the weights, whose sums lie in a cache, and backward once more for the gradients.

#include "cpu/kernels.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "experts.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// Of a stretch's columns a number each.
template <class T>
struct Line {
  alignas(64) T data[kStretch];
};

// e^x of an x up to 0; of what is no normal number nothing is left, which would only take time to be multiplied.
template <class V>
VF_HD V exp_down(V x) {
#if defined(CPU_CAPABILITY_AVX2)
  // as exp_parts, but for a power that has a place at once: 2^n of the least n is 0
  constexpr bool wide = kDouble<V>;
  constexpr double head = wide ? kLog2Head : kLog2HeadShort, tail = wide ? kLog2Tail : kLog2TailShort;
  const V zero = lit<V>(0), c = clamp_(x, lit<V>(wide ? -709.1 : -88), zero);
  const V n = rint_(c * lit<V>(1.44269504088896340736)), r = fma_(n, lit<V>(-tail), fma_(n, lit<V>(-head), c));
  return (lit<V>(1) + fma_(r * r, exp_tail<true>(r), r)) * power_of_two(n);
#else
  return select(less(x, lit<V>(kDouble<V> ? -708 : -87)), lit<V>(0), exp_(x));
#endif
}

template <class T, bool PRIOR, bool MASKED>
class Stretch {
  using V = Wide<T>;
  static_assert(kStretch % kLanes<T> == 0);

 public:
  Stretch(const ExpertsProblem& p, int64_t number)
      : p_(p), first_(number * kStretch), n_(int(p.columns - first_ < kStretch ? p.columns - first_ : kStretch)) {}

  void forward() {
    find_least();
    weigh(nullptr);
    T *mu = static_cast<T*>(p_.mu) + first_, *logvar = static_cast<T*>(p_.logvar) + first_;
    // by itself: a shorter chain of operations leaves room for more of them at a time
    for_columns([&](int i, int) { put(of_prior_.data, i, weight_of_prior<PRIOR>(at(least_.data, i))); });
    for_columns([&](int i, int left) {
      const V sum = at(sum_.data, i), of_prior = at(of_prior_.data, i);
      store_some(mu + i, at(mean_.data, i) / (sum + of_prior), left);
      store_some(logvar + i, product_logvar<PRIOR, MASKED>(sum, at(least_.data, i), of_prior), left);
    });
  }

  void backward() {
    find_least();
    // weights wait where gradients will be
    T* const weights = static_cast<T*>(p_.dmus ? p_.dmus : p_.dlogvars);
    weigh(weights);
    for_columns([&](int i, int) {
      const V share = lit<V>(1) / (at(sum_.data, i) + weight_of_prior<PRIOR>(at(least_.data, i)));
      put(sum_.data, i, share);
      put(mean_.data, i, at(mean_.data, i) * share);
    });
    const Line<T> nothing = {};
    const T* dmu = p_.dmu ? static_cast<const T*>(p_.dmu) + first_ : nothing.data;
    const T* dlogvar = p_.dlogvar ? static_cast<const T*>(p_.dlogvar) + first_ : nothing.data;
    for (int64_t m = 0; m < p_.experts; ++m) {
      const T *mu = row(p_.mus, m), *weight = row(weights, m);
      T *dmus = row(p_.dmus, m), *dlogvars = row(p_.dlogvars, m);
      look(m);
      for_columns([&](int i, int left) {
        const V share = load_some(weight + i, left) * at(sum_.data, i), up = load_some(dmu + i, left);
        if (dmus) store_some(dmus + i, there(i, share * up, 0), left);
        if (!dlogvars) return;
        const V apart = at(mean_.data, i) - load_some(mu + i, left);
        store_some(dlogvars + i, there(i, share * fma_(apart, up, load_some(dlogvar + i, left)), 0), left);
      });
    }
  }

 private:
  template <class F>
  VF_HD void for_columns(const F& f) const {
    for_some<T>(n_, f);
  }

  template <class P>
  auto row(P* data, int64_t m) const {
    using Own = std::conditional_t<std::is_const_v<P>, const T, T>;
    return data ? static_cast<Own*>(data) + m * p_.columns + first_ : nullptr;
  }

  // Which columns have expert m.
  void look(int64_t m) {
    if constexpr (MASKED) {
      const bool* row = p_.there + m * p_.rows;
      const int64_t each = p_.columns / p_.rows;
      if (each == 1) {
        for (int i = 0; i < n_; ++i) there_[i] = row[first_ + i];
        return;
      }
      int64_t r = first_ / each, end = (r + 1) * each - first_;
      for (int i = 0; i < n_; ++r, end += each) {
        const int last = int(end < n_ ? end : n_);
        // what is written beyond the end is the next row's, or none's
        const V here = lit<V>(row[r]);
        for (int k = i; k < last; k += kLanes<T>) put(there_, k, here);
        i = last;
      }
    }
  }

  VF_HD V there(int i, V x, double otherwise) const {
    return MASKED ? select(equal(at(there_, i), lit<V>(0)), lit<V>(otherwise), x) : x;
  }

  void find_least() {
    for (int64_t m = 0; m < p_.experts; ++m) {
      const T* logvar = row(p_.logvars, m);
      look(m);
      for_columns([&](int i, int left) {
        const V x = there(i, load_some(logvar + i, left), kMissing);
        const V before = m ? at(least_.data, i) : x;
        put(least_.data, i, select(less(x, before), x, before));
      });
    }
  }

  void weigh(T* weights) {
    for (int64_t m = 0; m < p_.experts; ++m) {
      const T *logvar = row(p_.logvars, m), *mu = row(p_.mus, m);
      T* kept = row(weights, m);
      look(m);
      for_columns([&](int i, int left) {
        const V x = there(i, load_some(logvar + i, left), kMissing), weight = exp_down(at(least_.data, i) - x);
        const V own = there(i, load_some(mu + i, left), 0);
        put(sum_.data, i, m ? at(sum_.data, i) + weight : weight);
        put(mean_.data, i, m ? fma_(weight, own, at(mean_.data, i)) : weight * own);
        if (kept) store_some(kept + i, weight, left);
      });
    }
  }

  const ExpertsProblem& p_;
  const int64_t first_;
  const int n_;
  Line<T> least_, sum_, mean_, of_prior_;
  alignas(64) T there_[kStretch + kLanes<T>];
};

template <class T, bool PRIOR, bool MASKED>
void run(const ExpertsProblem& p, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    Stretch<T, PRIOR, MASKED> stretch(p, k);
    p.backward ? stretch.backward() : stretch.forward();
  }
}

}  // namespace

template <class T>
void run_experts(const ExpertsProblem& p, int64_t begin, int64_t end) {
  if (p.prior) return p.there ? run<T, true, true>(p, begin, end) : run<T, true, false>(p, begin, end);
  p.there ? run<T, false, true>(p, begin, end) : run<T, false, false>(p, begin, end);
}

template void run_experts<float>(const ExpertsProblem&, int64_t, int64_t);
template void run_experts<double>(const ExpertsProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
