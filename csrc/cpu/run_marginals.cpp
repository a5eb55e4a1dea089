// The marginals of a batch's aggregate posterior (MarginalsProblem): samples along the lanes of a vector, the batch's
// posteriors one after the other, a few at a time.

#include "cpu/runs.h"
#include "cpu/tile.h"
#include "marginals.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// posteriors that are taken together: of a sum, and of the gradients, which keep two sums each
constexpr int kSummed = 8, kTogether = 4;
// samples whose gradients lie in the L1 cache, and posteriors after which a sum is added to the others
constexpr int kResident = 512;
constexpr int64_t kFlushed = 1024;

template <class T>
struct Latent {
  const T *z, *mu, *slope, *constant;
  T* marginals;

  Latent(const MarginalsProblem& p, int64_t d)
      : z(row(p.z, p, d)),
        mu(row(p.mu, p, d)),
        slope(row(p.slope, p, d)),
        constant(row(p.constant, p, d)),
        marginals(static_cast<T*>(p.marginals) + d * p.batch) {}

  static const T* row(const void* data, const MarginalsProblem& p, int64_t d) {
    return static_cast<const T*>(data) + d * p.batch;
  }
};

// The columns of some samples whose weights are not 1; none where there are none at all.
template <class T>
struct Columns {
  using V = Wide<T>;
  static constexpr int kLanes = lanes<V>();

  T column[2][kResident + kLanes], log[2][kResident + kLanes];
  T least[2][kResident / kLanes + 1], most[2][kResident / kLanes + 1];
  bool any = false;

  Columns(const MarginalsProblem& p, int64_t begin, int n) {
    if (!p.column[0]) return;
    any = true;
    for (int k = 0; k < 2; ++k) {
      for (int i = 0; i < n + kLanes; ++i) {
        const int64_t at = begin + (i < n ? i : n - 1);
        column[k][i] = static_cast<const T*>(p.column[k])[at];
        log[k][i] = static_cast<const T*>(p.log[k])[at];
        T &low = least[k][i / kLanes], &high = most[k][i / kLanes];
        if (i % kLanes == 0) low = high = column[k][i];
        low = column[k][i] < low ? column[k][i] : low;
        high = column[k][i] > high ? column[k][i] : high;
      }
    }
  }

  // Whether a vector's columns may be among [j, end).
  VF_HD bool meets(int i, int64_t j, int64_t end) const {
    if (!any) return false;
    const int v = i / kLanes;
    return (T(j) <= most[0][v] && least[0][v] < T(end)) || (T(j) <= most[1][v] && least[1][v] < T(end));
  }

  VF_HD V weighed(V x, int i, int64_t j) const {
    for (int k = 0; k < 2; ++k) {
      x = select(equal(at<T>(column[k], i), V(T(j))), x + at<T>(log[k], i), x);
    }
    return x;
  }
};

// A copy of some of a sample's numbers, and more to fill a vector: the last one again, or a given number.
template <class T>
struct Resident {
  T data[kResident + lanes<Wide<T>>()];

  Resident(const T* from, int n) : Resident(from, n, from[n - 1]) {}
  Resident(const T* from, int n, T more) {
    for (int i = 0; i < n; ++i) data[i] = from[i];
    for (int i = n; i < n + lanes<Wide<T>>(); ++i) data[i] = more;
  }
};

template <class V, class T>
VF_HD MarginalTerm<V> term(V z, const Latent<T>& of, int64_t j) {
  return marginal_term(z, V(of.mu[j]), V(of.slope[j]), V(of.constant[j]));
}

// A sum of exponentials, as e^top times what has been added up: the last terms, and before them.
template <class T>
struct Exponentials {
  using V = Wide<T>;
  V top = V(std::numeric_limits<T>::lowest()), last = V(T(0)), before = V(T(0));

  template <bool WEIGHED, int N>
  VF_HD void add(V z, const Latent<T>& of, const Columns<T>& columns, int i, int64_t j) {
    V x[N], most = top;
    for (int k = 0; k < N; ++k) {
      x[k] = term(z, of, j + k).exponent;
      if constexpr (WEIGHED) x[k] = columns.weighed(x[k], i, j + k);
      most = select(less(most, x[k]), x[k], most);
    }
    if (any(less(top, most))) {
      const V down = exp_(top - most);
      last = last * down;
      before = before * down;
      top = most;
    }
    V sum = exp_(x[0] - top);
    for (int k = 1; k < N; ++k) sum = sum + exp_(x[k] - top);
    last = last + sum;
  }

  template <int N>
  VF_HD void add(V z, const Latent<T>& of, const Columns<T>& columns, int i, int64_t j) {
    columns.meets(i, j, j + N) ? add<true, N>(z, of, columns, i, j) : add<false, N>(z, of, columns, i, j);
  }

  VF_HD void flush() {
    before = before + last;
    last = V(T(0));
  }
};

template <class T>
void forward(const MarginalsProblem& p, int64_t d, int64_t begin, int n) {
  using V = Wide<T>;
  const Latent<T> of(p, d);
  const Columns<T> columns(p, begin, n);
  const Resident<T> z(of.z + begin, n);
  T out[kResident + lanes<V>()];
  for_vectors<T>(n, [&](int i) {
    const V own = at<T>(z.data, i);
    Exponentials<T> sum;
    for (int64_t first = 0; first < p.batch; first += kFlushed) {
      const int64_t end = first + kFlushed < p.batch ? first + kFlushed : p.batch;
      int64_t j = first;
      for (; j + kSummed <= end; j += kSummed) sum.template add<kSummed>(own, of, columns, i, j);
      for (; j < end; ++j) sum.template add<1>(own, of, columns, i, j);
      sum.flush();
    }
    put(out, i, log_(sum.before) + sum.top);
  });
  for (int i = 0; i < n; ++i) of.marginals[begin + i] = out[i];
}

template <class T>
struct Samples {
  Resident<T> z, marginals, g;
  Columns<T> columns;
  T dz[kResident + lanes<Wide<T>>()];

  // beside the last sample stands one whose share is 0
  Samples(const MarginalsProblem& p, const Latent<T>& of, int64_t begin, int n)
      : z(of.z + begin, n),
        marginals(of.marginals + begin, n, std::numeric_limits<T>::infinity()),
        g(static_cast<const T*>(p.g) + begin, n, T(0)),
        columns(p, begin, n) {}
};

template <int N, class T>
void gradients(Samples<T>& s, int n, const Latent<T>& of, int64_t j, T* dmu, T* dlogvar) {
  using V = Wide<T>;
  MarginalSums<V> sums[N];
  for_vectors<T>(n, [&](int i) {
    const V z = at<T>(s.z.data, i), marginal = at<T>(s.marginals.data, i), g = at<T>(s.g.data, i);
    const bool meets = s.columns.meets(i, j, j + N);
    V dz = at<T>(s.dz, i);
    for (int k = 0; k < N; ++k) {
      auto [t, x] = term(z, of, j + k);
      if (meets) x = s.columns.weighed(x, i, j + k);
      dz = fma_(sums[k].add(exp_(x - marginal) * g, t), V(of.slope[j + k]), dz);
    }
    put(s.dz, i, dz);
  });
  for (int k = 0; k < N; ++k) {
    dmu[j + k] += T(2 * double(of.slope[j + k]) * sum_of_lanes<T>(sums[k].moved));
    dlogvar[j + k] += T(sum_of_lanes<T>(sums[k].of_logvar));
  }
}

template <class T>
void backward(const MarginalsProblem& p, int64_t d, int64_t chunk, int64_t begin, int n) {
  const Latent<T> of(p, d);
  Samples<T> s(p, of, begin, n);
  const int64_t sums = (chunk * p.latents + d) * p.batch;
  T *dmu = static_cast<T*>(p.dmu) + sums, *dlogvar = static_cast<T*>(p.dlogvar) + sums;
  double total[kResident] = {};
  for (int64_t first = 0; first < p.batch; first += kFlushed) {
    const int64_t end = first + kFlushed < p.batch ? first + kFlushed : p.batch;
    for (int i = 0; i < n + lanes<Wide<T>>(); ++i) s.dz[i] = 0;
    int64_t j = first;
    for (; j + kTogether <= end; j += kTogether) gradients<kTogether>(s, n, of, j, dmu, dlogvar);
    for (; j < end; ++j) gradients<1>(s, n, of, j, dmu, dlogvar);
    for (int i = 0; i < n; ++i) total[i] += double(s.dz[i]);
  }
  T* dz = static_cast<T*>(p.dz) + d * p.batch + begin;
  for (int i = 0; i < n; ++i) dz[i] = T(-2 * total[i]);
}

}  // namespace

template <class T>
void run_marginals(const MarginalsProblem& p, int64_t begin, int64_t end) {
  const int64_t size = (p.batch + p.chunks - 1) / p.chunks;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t d = task / p.chunks, chunk = task % p.chunks;
    const int64_t first = chunk * size, last = first + size < p.batch ? first + size : p.batch;
    for (int64_t i = first; i < last; i += kResident) {
      const int n = int(last - i < kResident ? last - i : kResident);
      p.backward ? backward<T>(p, d, chunk, i, n) : forward<T>(p, d, i, n);
    }
  }
}

template void run_marginals<float>(const MarginalsProblem&, int64_t, int64_t);
template void run_marginals<double>(const MarginalsProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
