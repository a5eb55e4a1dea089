// The log density of a mixture of Gaussians (MixtureProblem): samples along the lanes of a vector, some hundred of them
// beside each component in turn.

#include <limits>

#include "cpu/runs.h"
#include "cpu/tile.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {
// a unit of several files (setup.py) has others' names, too
namespace mixture {

using V = Wide<double>;
constexpr int kOwn = lanes<V>();
static_assert(MixtureChunks::kSampleLanes % kOwn == 0);

// vectors that go through a component's latents together
constexpr int kTogether = kOwn > 8 ? 2 : 4;

constexpr double kLog2Pi = 1.837877066409345483560659472811;

double finite_or_zero(double x) { return x - x == 0 ? x : 0; }

template <class T>
class Chunk {
 public:
  Chunk(const MixtureProblem& p, const MixtureChunks& chunks, int64_t number)
      : p_(p), K(p.components), D(p.latents), R(chunks.together) {
    double* next = chunks.scratch + number * chunks.each;
    const auto take = [&](int64_t n) { return (next += n) - n; };
    of_mu_ = take(K * D), of_logvar_ = take(K * D), of_weight_ = take(K);
    mu_ = take(K * D), root_ = take(K * D), constant_ = take(K);
    z_ = take(D * R), dz_ = take(D * R), x_ = take(K * R), moved_ = take(D * kOwn), squared_ = take(D * kOwn);
    for (int64_t i = 0; p.backward && i < p.sums(); ++i) of_mu_[i] = 0;
    weights();
    components();
  }

  void run(int64_t first, int64_t end) {
    for (; first < end; first += R) {
      const int n = int(end - first < R ? end - first : R);
      samples(first, n);
      every<kTogether>(n, [&](auto vectors, int i) { exponents<vectors.value>(i); });
      p_.backward ? backward(first, n) : forward(first, n);
    }
  }

 private:
  template <int N>
  using Count = std::integral_constant<int, N>;

  // f(Count<N>, position) for N vectors at a time, then one by one.
  template <int N, class F>
  static void every(int n, const F& f) {
    int i = 0;
    for (; i + (N - 1) * kOwn < n; i += N * kOwn) f(Count<N>{}, i);
    for (; i < n; i += kOwn) f(Count<1>{}, i);
  }

  const T* given(const void* data) const { return static_cast<const T*>(data); }

  // The components' log weights, where their constants will be.
  void weights() {
    const T* logits = given(p_.logits);
    if (!logits) {
      for (int64_t k = 0; k < K; ++k) constant_[k] = -log_(double(K));
      return;
    }
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t k = 0; k < K; ++k) top = double(logits[k]) > top ? double(logits[k]) : top;
    top = finite_or_zero(top);
    for (int64_t k = 0; k < K; ++k) sum += exp_(double(logits[k]) - top);
    for (int64_t k = 0; k < K; ++k) constant_[k] = (double(logits[k]) - top) - log_(sum);
  }

  void components() {
    const T *mus = given(p_.mus), *logvars = given(p_.logvars);
    for (int64_t i = 0; i < K * D; ++i) mu_[i] = double(mus[i]), root_[i] = -0.5 * double(logvars[i]);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t d = 0; d < D; ++d) constant_[k] += root_[k * D + d] - 0.5 * kLog2Pi;
    }
    for (int64_t i = 0; i < K * D; i += kOwn) {
      const int left = int(K * D - i < kOwn ? K * D - i : kOwn);
      store_some(root_ + i, exp_(load_some(root_ + i, left)), left);
    }
  }

  // n samples side by side for each latent, and copies of the last to fill a vector.
  void samples(int64_t first, int n) {
    const T* z = given(p_.z) + first * D;
    for (int i = 0; i < n + kOwn - 1 && i < R; ++i) {
      const T* from = z + (i < n ? i : n - 1) * D;
      for (int64_t d = 0; d < D; ++d) z_[d * R + i] = double(from[d]);
    }
  }

  template <int N>
  void exponents(int i) {
    for (int64_t k = 0; k < K; ++k) {
      V sum[N];
      for (V& each : sum) each = V(0.0);
      for (int64_t d = 0; d < D; ++d) {
        const V mu(mu_[k * D + d]), root(root_[k * D + d]);
        for (int v = 0; v < N; ++v) {
          const V t = (at(z_ + d * R, i + v * kOwn) - mu) * root;
          sum[v] = fma_(t, t, sum[v]);
        }
      }
      for (int v = 0; v < N; ++v) put(x_ + k * R, i + v * kOwn, fma_(V(-0.5), sum[v], V(constant_[k])));
    }
  }

  // The largest exponent, or 0 where all are infinite.
  V top(int i) const {
    V most(-std::numeric_limits<double>::infinity());
    for (int64_t k = 0; k < K; ++k) {
      const V x = at(x_ + k * R, i);
      most = select(less(most, x), x, most);
    }
    return select(equal(most - most, V(0.0)), most, V(0.0));
  }

  void forward(int64_t first, int n) {
    T* value = static_cast<T*>(p_.value) + first;
    for_vectors<double>(n, [&](int i) {
      const V most = top(i);
      V sum(0.0);
      for (int64_t k = 0; k < K; ++k) sum = sum + exp_(at(x_ + k * R, i) - most);
      double lanes[kOwn];
      put(lanes, 0, log_(sum) + most);
      for (int l = 0; l < kOwn && i + l < n; ++l) value[i + l] = T(lanes[l]);
    });
  }

  // From exponents to shares, p(k | z) g.
  void share(int64_t first, int n) {
    const T* g = given(p_.g) + first;
    for_vectors<double>(n, [&](int i) {
      double upstream[kOwn] = {};
      for (int l = 0; l < kOwn && i + l < n; ++l) upstream[l] = double(g[i + l]);
      const V most = top(i);
      V sum(0.0);
      for (int64_t k = 0; k < K; ++k) {
        const V e = exp_(at(x_ + k * R, i) - most);
        put(x_ + k * R, i, e);
        sum = sum + e;
      }
      const V factor = at(upstream, 0) / sum;
      for (int64_t k = 0; k < K; ++k) put(x_ + k * R, i, at(x_ + k * R, i) * factor);
    });
  }

  template <int N>
  V gradients(int64_t k, int i) {
    V share[N], sum(0.0);
    for (int v = 0; v < N; ++v) share[v] = at(x_ + k * R, i + v * kOwn), sum = sum + share[v];
    for (int64_t d = 0; d < D; ++d) {
      const V mu(mu_[k * D + d]), root(root_[k * D + d]);
      V moved = at(moved_ + d * kOwn, 0), squared = at(squared_ + d * kOwn, 0);
      for (int v = 0; v < N; ++v) {
        const int place = i + v * kOwn;
        const V t = (at(z_ + d * R, place) - mu) * root, of_mean = share[v] * t;
        moved = moved + of_mean;
        squared = fma_(of_mean, t, squared);
        put(dz_ + d * R, place, fma_(of_mean, root, at(dz_ + d * R, place)));
      }
      put(moved_ + d * kOwn, 0, moved);
      put(squared_ + d * kOwn, 0, squared);
    }
    return sum;
  }

  void backward(int64_t first, int n) {
    share(first, n);
    for (int64_t i = 0; i < D * R; ++i) dz_[i] = 0;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < D * kOwn; ++i) moved_[i] = squared_[i] = 0;
      V sum(0.0);
      every<kTogether>(n, [&](auto vectors, int i) { sum = sum + gradients<vectors.value>(k, i); });
      const double all = sum_of_lanes<double>(sum);
      of_weight_[k] += all;
      for (int64_t d = 0; d < D; ++d) {
        of_mu_[k * D + d] += root_[k * D + d] * sum_of_lanes<double>(at(moved_ + d * kOwn, 0));
        of_logvar_[k * D + d] += 0.5 * (sum_of_lanes<double>(at(squared_ + d * kOwn, 0)) - all);
      }
    }
    T* dz = static_cast<T*>(p_.dz) + first * D;
    for (int i = 0; i < n; ++i) {
      for (int64_t d = 0; d < D; ++d) dz[i * D + d] = T(-dz_[d * R + i]);
    }
  }

  const MixtureProblem& p_;
  const int64_t K, D, R;
  double *of_mu_, *of_logvar_, *of_weight_;
  double *mu_, *root_, *constant_;  // root is 1 / std
  double *z_, *dz_, *x_;            // of some samples, side by side
  double *moved_, *squared_;        // a vector for each latent
};

template <class T>
void run(const MixtureProblem& p, const MixtureChunks& chunks, int64_t begin, int64_t end) {
  const int64_t size = (p.samples + chunks.count - 1) / chunks.count;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t first = k * size, last = first + size < p.samples ? first + size : p.samples;
    Chunk<T>(p, chunks, k).run(first, last);
  }
}

}  // namespace mixture
}  // namespace

void run_mixture(const MixtureProblem& p, const MixtureChunks& chunks, int64_t begin, int64_t end) {
  p.wide ? mixture::run<double>(p, chunks, begin, end) : mixture::run<float>(p, chunks, begin, end);
}

}  // namespace VF_ISA
}  // namespace vaefast
