// The log density ratios of draws (LogRatioProblem): latents along the lanes of a vector, the draws of a sample one
// after the other, so that what q and p are made of is computed once for all of them.

#include "cpu/kernels.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "log_ratio.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// draws after which a sum over them is added to the others, in double
constexpr int kChain = 64;

// One vector: rows are short, and two would fill with what stands behind their end.
template <class T>
constexpr int kStep = lanes<Vec<T>>();

// A Gaussian of some latents, and more to fill a vector.
template <class T>
struct Marginal {
  alignas(64) T mu[kStretch + kStep<T>], logvar[kStretch + kStep<T>], root[kStretch + kStep<T>];

  Marginal(const void* mu, const Number& mu_value, const void* logvar, const Number& logvar_value, int64_t at, int n) {
    fill(mu, mu_value, at, n, this->mu);
    fill(logvar, logvar_value, at, n, this->logvar);
    for_vectors<T, Vec<T>>(
        n, [&](int i) { put(root, i, exp_(vaefast::at<T, Vec<T>>(this->logvar, i) * lit<Vec<T>>(-0.5))); });
  }

  VF_HD Standardized<Vec<T>> of(Vec<T> z, int i) const {
    using V = Vec<T>;
    return standardized(z - at<T, V>(mu, i), at<T, V>(root, i), at<T, V>(logvar, i));
  }

 private:
  static void fill(const void* from, const Number& value, int64_t at, int n, T* to) {
    const T* data = static_cast<const T*>(from);
    for (int i = 0; i < n; ++i) to[i] = data ? data[at + i] : lit<T>(value);
    for (int i = n; i < n + kStep<T>; ++i) to[i] = 0;
  }
};

// f(latent, vector of z) for a row; behind its end stand zeros.
template <class T, class F>
VF_HD void for_row(const T* z, int n, const F& f) {
  using V = Vec<T>;
  int i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) f(i, at<T, V>(z, i));
  if (i == n) return;
  T rest[kStep<T>] = {};
  for (int l = 0; l < n - i; ++l) rest[l] = z[i + l];
  f(i, load_lanes<V>(rest));
}

template <class T>
struct Pair {
  Marginal<T> q, p;

  Pair(const LogRatioProblem& r, int64_t at, int n)
      : q(r.mu, {}, r.logvar, {}, at, n),
        p(r.prior_mu, r.prior_mu_value, r.prior_logvar, r.prior_logvar_value, r.prior ? at : 0, r.prior ? n : 0) {}
};

template <class T, bool PRIOR>
void add(const Pair<T>& of, const T* z, int64_t step, int draws, int n, double* sums) {
  using V = Vec<T>;
  for (int k = 0; k < draws; ++k, z += step) {
    V sum = lit<V>(0);
    for_row(z, n, [&](int i, V x) {
      V twice = of.q.of(x, i).twice;
      if constexpr (PRIOR) twice = twice - of.p.of(x, i).twice;
      sum = sum + twice;
    });
    sums[k] += sum_of_lanes<T>(sum);
  }
}

template <class T>
void forward(const LogRatioProblem& p, int64_t sample, int64_t first, int draws) {
  double sums[kStretch] = {};
  const int64_t step = p.samples * p.latents, row = sample * p.latents;
  for (int64_t d = 0; d < p.latents; d += kStretch) {
    const int n = int(p.latents - d < kStretch ? p.latents - d : kStretch);
    const Pair<T> of(p, row + d, n);
    const T* z = static_cast<const T*>(p.z) + first * step + row + d;
    p.prior ? add<T, true>(of, z, step, draws, n, sums) : add<T, false>(of, z, step, draws, n, sums);
  }
  T* ratio = static_cast<T*>(p.ratio) + first * p.samples + sample;
  for (int k = 0; k < draws; ++k) ratio[k * p.samples] = T(0.5 * sums[k]);
}

// A gradient of some latents, summed over the draws.
template <class T>
struct Total {
  alignas(64) T chain[kStretch + kStep<T>] = {};
  double sum[kStretch] = {};

  VF_HD void add(int i, Vec<T> x) { put(chain, i, at<T, Vec<T>>(chain, i) + x); }
  void flush(int n) {
    for (int i = 0; i < n; ++i) sum[i] += double(chain[i]);
    for (int i = 0; i < n; ++i) chain[i] = 0;
  }
  void write(void* to, int64_t at, int n, double factor) const {
    for (int i = 0; to && i < n; ++i) static_cast<T*>(to)[at + i] = T(factor * sum[i]);
  }
};

// With PRIOR also the part of the prior in the gradient of z, with TRAINED the gradients of the prior.
template <class T, bool PRIOR, bool TRAINED>
void backward(const LogRatioProblem& p, int64_t at, int64_t sample, int n) {
  using V = Vec<T>;
  const Pair<T> of(p, at, n);
  Total<T> mu, logvar, prior_mu, prior_logvar;
  const V one = lit<V>(1);
  for (int64_t k = 0; k < p.draws; ++k) {
    const int64_t row = k * p.samples * p.latents + at;
    const T* z = static_cast<const T*>(p.z) + row;
    T* dz = static_cast<T*>(p.dz) + row;
    const V g = V(static_cast<const T*>(p.g)[k * p.samples + sample]);
    for_row(z, n, [&](int i, V x) {
      const auto q = of.q.of(x, i);
      const V slope = q.d * q.inverse;
      V found = slope;
      mu.add(i, g * slope);
      logvar.add(i, g * fma_(lit<V>(0) - q.d, q.d, one));
      if constexpr (PRIOR) {
        const auto prior = of.p.of(x, i);
        const V of_prior = prior.d * prior.inverse;
        found = slope - of_prior;
        if constexpr (TRAINED) {
          prior_mu.add(i, g * of_prior);
          prior_logvar.add(i, g * fma_(prior.d, prior.d, lit<V>(0) - one));
        }
      }
      found = g * found;
      if (n - i >= kStep<T>) return store_lanes(found, dz + i);
      T rest[kStep<T>];
      store_lanes(found, rest);
      for (int l = 0; l < n - i; ++l) dz[i + l] = rest[l];
    });
    if (k % kChain != kChain - 1 && k != p.draws - 1) continue;
    for (Total<T>* total : {&mu, &logvar, &prior_mu, &prior_logvar}) total->flush(n);
  }
  mu.write(p.dmu, at, n, -1);
  logvar.write(p.dlogvar, at, n, 0.5);
  prior_mu.write(p.dprior_mu, at, n, 1);
  prior_logvar.write(p.dprior_logvar, at, n, 0.5);
}

template <class T>
void backward(const LogRatioProblem& p, int64_t sample, int64_t first, int n) {
  const int64_t at = sample * p.latents + first;
  if (!p.prior) return backward<T, false, false>(p, at, sample, n);
  p.dprior_mu || p.dprior_logvar ? backward<T, true, true>(p, at, sample, n)
                                 : backward<T, true, false>(p, at, sample, n);
}

}  // namespace

template <class T>
void run_log_ratio(const LogRatioProblem& p, int64_t begin, int64_t end) {
  const int64_t stretches = log_ratio_stretches(p), all = p.backward ? p.latents : p.draws;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / stretches, first = task % stretches * kStretch;
    const int n = int(all - first < kStretch ? all - first : kStretch);
    p.backward ? backward<T>(p, sample, first, n) : forward<T>(p, sample, first, n);
  }
}

template void run_log_ratio<float>(const LogRatioProblem&, int64_t, int64_t);
template void run_log_ratio<double>(const LogRatioProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
