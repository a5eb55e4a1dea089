// The log density ratios of draws (LogRatioProblem), in the order in which the draws lie in memory: forward row by row,
// backward a block of the posterior's numbers after the other, each through all draws.

#include "cpu/kernels.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "log_ratio.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// draws after which a sum over them is added to the others, in double, and vectors after which one over latents is
constexpr int kChain = 64;

// One vector: rows are short, and two would fill with what stands behind their end.
template <class T>
constexpr int kStep = lanes<Vec<T>>();

template <class T>
const T* from(const void* data, int64_t at) {
  return data ? static_cast<const T*>(data) + at : nullptr;
}

// q's or p's numbers from one on.
template <class T>
struct Gaussian {
  using V = Vec<T>;
  const T *mu, *logvar, *root;

  Gaussian(const GaussianNumbers& g, int64_t at)
      : mu(from<T>(g.mu, at)), logvar(from<T>(g.logvar, at)), root(from<T>(g.root, at)) {}

  VF_HD Standardized<V> of(V z, int i) const {
    return standardized(z - at<T, V>(mu, i), at<T, V>(root, i), at<T, V>(logvar, i));
  }
};

template <class T, DrawPrior P>
VF_HD Standardized<Vec<T>> under(const Gaussian<T>& p, Vec<T> z, int i) {
  if constexpr (P == DrawPrior::kGiven) {
    return p.of(z, i);
  } else {
    return {z, lit<Vec<T>>(1), z * z};
  }
}

// 0 kStep times, then 1
template <class T>
struct Steps {
  T data[2 * kStep<T>];
  Steps() {
    for (int l = 0; l < 2 * kStep<T>; ++l) data[l] = T(l >= kStep<T>);
  }
};

template <class T, DrawPrior P>
VF_HD Vec<T> term(const Gaussian<T>& q, const Gaussian<T>& p, Vec<T> z, int i) {
  const Vec<T> twice = q.of(z, i).twice;
  if constexpr (P == DrawPrior::kNone) {
    return twice;
  } else {
    return twice - under<T, P>(p, z, i).twice;
  }
}

// Twice a row's sum.
template <class T, DrawPrior P>
double row(const Gaussian<T>& q, const Gaussian<T>& p, const T* z, int64_t latents, const Steps<T>& steps) {
  using V = Vec<T>;
  constexpr int step = kStep<T>;
  const V zero = lit<V>(0);
  double total = 0;
  V sum = zero;
  int64_t i = 0;
  for (int vectors = 1; i + step <= latents; i += step, ++vectors) {
    sum = sum + term<T, P>(q, p, at<T, V>(z, int(i)), int(i));
    if (vectors % kChain != 0) continue;
    total += sum_of_lanes<T>(sum);
    sum = zero;
  }
  if (i < latents && latents >= step) {
    // the last whole vector once more, without what has been added
    const int last = int(latents) - step;
    const V fresh = at<T, V>(steps.data, int(latents - i));
    sum = sum + select(equal(fresh, zero), zero, term<T, P>(q, p, at<T, V>(z, last), last));
  } else if (i < latents) {
    T rest[5][step] = {};
    const T* of[] = {z, q.mu, q.logvar, p.mu, p.logvar};
    T root[2][step] = {};
    for (int l = 0; l < latents; ++l) {
      for (int k = 0; k < (P == DrawPrior::kGiven ? 5 : 3); ++k) rest[k][l] = of[k][l];
      root[0][l] = q.root[l];
      if constexpr (P == DrawPrior::kGiven) root[1][l] = p.root[l];
    }
    const Gaussian<T> few_q({rest[1], rest[2], root[0]}, 0), few_p({rest[3], rest[4], root[1]}, 0);
    sum = term<T, P>(few_q, few_p, load_lanes<V>(rest[0]), 0);
  }
  return total + sum_of_lanes<T>(sum);
}

template <class T, DrawPrior P>
void forward(const LogRatioProblem& p, int64_t begin, int64_t end) {
  const Steps<T> steps;
  T* ratio = static_cast<T*>(p.ratio);
  int64_t sample = begin % p.samples;
  for (int64_t r = begin; r < end; ++r) {
    const Gaussian<T> q(p.q, sample * p.latents), prior(p.p, sample * p.latents);
    ratio[r] = T(0.5 * row<T, P>(q, prior, static_cast<const T*>(p.z) + r * p.latents, p.latents, steps));
    if (++sample == p.samples) sample = 0;
  }
}

// Some numbers of the posterior's, and more to fill a vector.
template <class T>
struct Block {
  alignas(64) T data[kColumns + kStep<T>] = {};

  Block() = default;
  Block(const void* numbers, int64_t at, int n) { fill(from<T>(numbers, at), n); }
  void fill(const T* numbers, int n) {
    for (int i = 0; numbers && i < n; ++i) data[i] = numbers[i];
  }
};

// A gradient of a block, summed over the draws.
template <class T>
struct Total {
  Block<T> chain;
  double sum[kColumns] = {};

  VF_HD void add(int i, Vec<T> x) { put(chain.data, i, at<T, Vec<T>>(chain.data, i) + x); }
  void flush(int n) {
    for (int i = 0; i < n; ++i) {
      sum[i] += double(chain.data[i]);
      chain.data[i] = 0;
    }
  }
  void write(void* to, int64_t at, int n, double factor) const {
    for (int i = 0; to && i < n; ++i) static_cast<T*>(to)[at + i] = T(factor * sum[i]);
  }
};

template <class T, DrawPrior P>
void backward(const LogRatioProblem& p, int64_t at, int n) {
  using V = Vec<T>;
  constexpr int step = kStep<T>;
  constexpr bool given = P == DrawPrior::kGiven;
  const int whole = n / step * step;
  // the loop's last vector may reach beyond the block
  Block<T> mu(p.q.mu, at, n), root(p.q.root, at, n), prior_mu, prior_root, g, z_end, dz_end;
  const Block<T> zeros;
  const Gaussian<T> q({mu.data, zeros.data, root.data}, 0), prior({prior_mu.data, zeros.data, prior_root.data}, 0);
  if constexpr (given) {
    prior_mu.fill(from<T>(p.p.mu, at), n);
    prior_root.fill(from<T>(p.p.root, at), n);
  }
  Total<T> totals[given ? 4 : 2];
  const int64_t first_sample = at / p.latents, first_end = (first_sample + 1) * p.latents - at;
  for (int64_t k = 0; k < p.draws; ++k) {
    const int64_t first = k * p.samples * p.latents + at;
    const T *z = static_cast<const T*>(p.z) + first, *of_row = static_cast<const T*>(p.g) + k * p.samples;
    T* dz = static_cast<T*>(p.dz) + first;
    int64_t sample = first_sample, left = first_end;
    for (int i = 0; i < n; ++sample, left += p.latents) {
      const T up = of_row[sample];
      for (const int end = int(left < n ? left : n); i < end; ++i) g.data[i] = up;
    }
    for (int i = whole; i < n; ++i) z_end.data[i - whole] = z[i];
    for (int i = 0; i < n; i += step) {
      const V x = vaefast::at<T, V>(i < whole ? z + i : z_end.data, 0), up = vaefast::at<T, V>(g.data, i);
      const auto of_q = slopes_of(q.of(x, i));
      V slope = of_q.mu;
      totals[0].add(i, up * of_q.mu);
      totals[1].add(i, up * of_q.logvar);
      if constexpr (P != DrawPrior::kNone) {
        const auto of_prior = slopes_of(under<T, P>(prior, x, i));
        slope = slope - of_prior.mu;
        if constexpr (given) {
          totals[2].add(i, up * of_prior.mu);
          totals[3].add(i, up * of_prior.logvar);
        }
      }
      store_lanes(up * slope, i < whole ? dz + i : dz_end.data);
    }
    for (int i = whole; i < n; ++i) dz[i] = dz_end.data[i - whole];
    if (k % kChain != kChain - 1 && k != p.draws - 1) continue;
    for (Total<T>& total : totals) total.flush(n);
  }
  totals[0].write(p.dmu, at, n, -1);
  totals[1].write(p.dlogvar, at, n, -0.5);
  if constexpr (given) {
    totals[2].write(p.dprior_mu, at, n, 1);
    totals[3].write(p.dprior_logvar, at, n, 0.5);
  }
}

template <class T, DrawPrior P>
void run(const LogRatioProblem& p, int64_t begin, int64_t end) {
  if (!p.backward) return forward<T, P>(p, begin, end);
  const int64_t all = p.samples * p.latents;
  for (int64_t at = begin * kColumns; at < all && at < end * kColumns; at += kColumns) {
    backward<T, P>(p, at, int(all - at < kColumns ? all - at : kColumns));
  }
}

}  // namespace

template <class T>
void run_log_ratio(const LogRatioProblem& p, int64_t begin, int64_t end) {
  visit(p.prior, [&](auto prior) { run<T, decltype(prior)::value>(p, begin, end); });
}

template void run_log_ratio<float>(const LogRatioProblem&, int64_t, int64_t);
template void run_log_ratio<double>(const LogRatioProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
