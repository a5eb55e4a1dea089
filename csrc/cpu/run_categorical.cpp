// Categorical latents (CategoricalProblem). With s and t the softmaxes of q's and p's logits l and m, d = m - l less
// its mean under s, and h(x) = e^x - 1 - x:
//
//     log t - log s = d - log(1 + S),    S = sum s h(d),    t - s = s (e^d - 1 - S) / (1 + S)
//
// in which nothing cancels next to p = q: log(1 + S) is the KL of the softmaxes. Where d is not small its terms are
// taken from t itself, which also is right where s is 0; where S is not, log(1 + S) is the difference of the logarithms
// of the sums less the mean.
//
// With a uniform share u they are q = s + u and p = t + u, both divided by the share of the softmax, and of
// KL = sum q h(log(p / q)) each term is x - q log(1 + x / q) with x = p - q, which does not cancel either.

#include <cstring>

#include "cpu/classes.h"
#include "cpu/runs.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// |d| below which e^d - 1 and h(d) go by a series, and S up to which it is what t - s is made of
constexpr double kNearBy = 2 * kNearRoot, kSmallSum = 16;

// Stands for d where s is 0: above every difference, and not so large that 0 times it times a gradient is NaN.
constexpr double kApart = 1e20;
// and how far below its largest logit one of p's counts, beside a uniform share
constexpr double kLeast = 1e4;

// e^x - 1 - x for |x| < kNearBy
template <class V>
VF_HD V near_h(V x) {
  const V y = x * lit<V>(0.5), square = y * y, Q = square * exp_tail(y);
  return fma_(Q, fma_(y, lit<V>(2), Q + lit<V>(2)), square);
}

// e^x for x <= 0; no subnormal numbers, which would cost some hundred cycles an operation.
template <class V>
VF_HD V exp_down(V x) {
  return select(less(x, lit<V>(kDouble<V> ? -708 : -87)), lit<V>(0), exp_(x));
}

template <class V>
VF_HD V larger(V a, V b) {
  return select(less(a, b), b, a);
}

// Some sites, as the way L to lay them out has them, piece by piece where one does not hold all classes.
template <class T, class L, bool MIXED>
class Sites {
 public:
  using V = Wide<T>;

  Sites(const CategoricalProblem& p, const Tile& t)
      : p_(p), t_(t), pieces_(L::kAtOnce == 1 ? (p.classes + kBlock - 1) / kBlock : 1) {
    if (pieces_ == 1) read(0);
  }

  // Exponentials and their sums; with a KL also the mean of d, and S.
  VF_CALLED void sum_up() {
    V most_q = lit<V>(0) - infinity<V>(), most_p = most_q;
    pass([&](int i) {
      most_q = larger(most_q, at<T>(q_, i));
      if (p_.kl) most_p = larger(most_p, at<T>(prior_, i));
    });
    most_q_ = L::most(most_q);
    most_p_ = L::most(most_p);
    least_p_ = most_p_ - lit<V>(kLeast);
    const V offset = most_p_ - most_q_;
    raw_ = select(less(abs_(offset), lit<V>(1)), lit<V>(1), lit<V>(0));
    advance();
    Chains<V> sum_q, sum_p, sum_d;
    pass([&](int i) {
      const V e = at<T>(q_, i);
      sum_q.add(e);
      if (!p_.kl) return;
      sum_p.add(at<T>(prior_, i));
      sum_d.add(e * at<T>(d_, i));
    });
    inverse_q_ = reciprocal(L::sum(sum_q.total()));
    if (!p_.kl) return;
    const V whole_p = L::sum(sum_p.total());
    inverse_p_ = reciprocal(whole_p);
    mean_ = L::sum(sum_d.total()) * inverse_q_;
    const V shift = select(equal(raw_, lit<V>(0)), lit<V>(0), offset) - mean_, of_t = exp_(shift) * inverse_q_;
    Chains<V> sum;
    pass([&](int i) {
      const V s = at<T>(q_, i) * inverse_q_, d = at<T>(d_, i) - mean_;
      const V far = fma_(at<T>(prior_, i), of_t, lit<V>(0) - fma_(s, d, s));
      sum.add(select(less(abs_(d), lit<V>(kNearBy)), s * near_h(d), far));
    });
    const V one = lit<V>(1);
    sum_ = L::sum(sum.total());
    const auto small = less(sum_, lit<V>(kSmallSum));
    near_ = select(small, lit<V>(kNearBy), lit<V>(0));
    inverse_ = reciprocal(one + select(small, sum_, one));
    const V tail = twice_atanh(sum_ * reciprocal(sum_ + lit<V>(2)));
    const V log = log_(select(small, one + sum_, whole_p * inverse_q_));
    kl_ = select(less(sum_, one), tail, select(small, log, log + shift));
  }

  VF_CALLED V kl() {
    if constexpr (MIXED) {
      Chains<V> sum;
      pass([&](int i) { sum.add(apart(i).kl); });
      kl_ = L::sum(sum.total()) * lit<V>(p_.share);
    }
    return kl_;
  }

  // A vector of what is in proportion to q, which is all that drawing asks for; `behind` is where its classes end.
  VF_HD void weights(int i, int64_t behind, T* to) const {
    put(to, 0, MIXED ? fma_(at<T>(q_, i), inverse_q_, lit<V>(p_.uniform)) : at<T>(q_, i));
    if constexpr (L::kAtOnce == 1) {
      for (int64_t l = lanes<V>() - (behind - p_.classes); behind > p_.classes && l < lanes<V>(); ++l) to[l] = 0;
    }
  }

  // Gradients from the sample's, which is read, and from the KL's in q and in p.
  VF_CALLED void differentiate(V of_q, V of_p) {
    of_q_ = of_q;
    if (pieces_ == 1) read_upstream(0);
    advance();
    Chains<V> sum_q, sum_p;
    pass([&](int i) {
      sum_q.add(at<T>(q_, i) * at<T>(upstream_, i));
      if (MIXED && p_.kl) sum_p.add(at<T>(prior_, i) * at<T>(d_, i));
    });
    const V mean_q = L::sum(sum_q.total()), mean_p = L::sum(sum_p.total());
    const V share = lit<V>(p_.share), share_p = share * of_p;
    pass(
        [&](int i) {
          put(q_, i, share * at<T>(q_, i) * (at<T>(upstream_, i) - mean_q));
          if (!p_.kl) return;
          const V g = at<T>(d_, i);
          put(prior_, i, MIXED ? share_p * at<T>(prior_, i) * (g - mean_p) : of_p * g);
        },
        [&](int64_t piece) {
          L::write({p_.out_dlogits, p_.out_dlogits_step, count(piece), piece * kBlock}, t_, q_);
          if (p_.kl) L::write({p_.out_dprior, p_.out_dprior_step, count(piece), piece * kBlock}, t_, prior_);
        });
  }

  // f(number in the block) for each vector of classes, and g(piece) behind each piece.
  template <class F, class G>
  VF_HD void pass(const F& f, const G& g) {
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      if (pieces_ > 1) bring(piece);
      const int vectors = L::vectors(count(piece));
      for (int k = 0; k < vectors; ++k) f(k * lanes<V>());
      g(piece);
    }
  }
  template <class F>
  VF_HD void pass(const F& f) {
    pass(f, [](int64_t) {});
  }

 private:
  int count(int64_t piece) const {
    const int64_t left = p_.classes - piece * kBlock;
    return int(left < kBlock ? left : kBlock);
  }

  void read(int64_t piece) {
    const int n = count(piece);
    const T never = -std::numeric_limits<T>::infinity();
    L::read({p_.logits, p_.logits_step, n, piece * kBlock}, t_, q_, never);
    if (p_.kl) L::read({p_.prior, p_.prior_step, n, piece * kBlock}, t_, prior_, never);
  }

  void read_upstream(int64_t piece) { L::read({p_.dz, p_.dz_step, count(piece), piece * kBlock}, t_, upstream_, T(0)); }

  // What has been done to all pieces, done to this one.
  VF_CALLED void bring(int64_t piece) {
    read(piece);
    if (steps_ >= 1) exponentials(piece);
    if (steps_ < 2) return;
    read_upstream(piece);
    terms(piece);
  }

  VF_HD void advance() {
    ++steps_;
    if (pieces_ == 1) steps_ == 1 ? exponentials(0) : terms(0);
  }

  // In place of the logits: of q and of p, and d but for its mean. The difference of two logits is exact where they
  // are near each other; where one's are larger by far, what they have beyond the largest is.
  VF_CALLED void exponentials(int64_t piece) {
    const int n = L::vectors(count(piece)) * lanes<V>();
    for_vectors<T>(n, [&](int i) {
      const V l = at<T>(q_, i), down_q = l - most_q_, e = exp_down(down_q);
      put(q_, i, e);
      if (!p_.kl) return;
      V m = at<T>(prior_, i);
      if constexpr (MIXED) m = larger(m, least_p_);
      const V down_p = m - most_p_;
      put(prior_, i, exp_down(down_p));
      const V d = select(equal(raw_, lit<V>(0)), down_p - down_q, m - l);
      put(d_, i, select(equal(e, lit<V>(0)), lit<V>(kApart), d));
    });
  }

  // In their place the softmaxes, in d's what p's gradient is made of, and in the sample's that of q's.
  VF_CALLED void terms(int64_t piece) {
    const int n = L::vectors(count(piece)) * lanes<V>();
    for_vectors<T>(n, [&](int i) {
      const V e_q = at<T>(q_, i), e_p = at<T>(prior_, i), v = at<T>(upstream_, i);
      if (p_.kl) {
        const Apart a = apart(i);
        put(upstream_, i, fma_(lit<V>(0) - of_q_, a.ratio, v));
        put(d_, i, a.of_p);
        put(prior_, i, e_p * inverse_p_);
      }
      put(q_, i, e_q * inverse_q_);
    });
  }

  // Of one class: its term of the KL, log(p / q) but for what all classes have in common, and what the gradient in p's
  // logits is made of.
  struct Apart {
    V kl, ratio, of_p;
  };

  VF_HD Apart apart(int i) const {
    const V s = at<T>(q_, i) * inverse_q_, t = at<T>(prior_, i) * inverse_p_, d = at<T>(d_, i) - mean_;
    const auto near = less(abs_(d), near_);
    const V x = select(near, s * ((d + near_h(d)) - sum_) * inverse_, t - s);
    if constexpr (!MIXED) {
      return {x, d, x};
    } else {
      const V one = lit<V>(1), u = lit<V>(p_.uniform);
      const V q = s + u, p = select(near, q + x, t + u);
      const auto r = log_parts(p * reciprocal(q));
      const auto close = equal(r.exponent, lit<V>(0));
      // log(p / q) = exponent log 2 + 2 atanh(a)
      const V a = select(close, x, r.mantissa - one) * reciprocal(select(close, p + q, r.mantissa + one));
      const V whole = r.exponent * lit<V>(0.693147180559945309417), excess = atanh_excess(a);
      const V apart = fma_(lit<V>(0) - q, whole + (a + a), x);
      return {fma_(lit<V>(0) - q, excess, select(close, x * a, apart)), whole + ((a + a) + excess), x * reciprocal(p)};
    }
  }

  const CategoricalProblem& p_;
  const Tile& t_;
  int64_t pieces_;
  int steps_ = 0;
  V most_q_, most_p_, least_p_, raw_, inverse_q_, inverse_p_, mean_, sum_, near_, inverse_, kl_, of_q_;
  alignas(64) T q_[kBlock];
  alignas(64) T prior_[kBlock];
  alignas(64) T d_[kBlock];
  alignas(64) T upstream_[kBlock];
};

// Which class, and the 1 that is put there, or NaN.
template <class T>
struct Drawn {
  int64_t place = 0;
  T value = 1;
};

// the least share that is left between a uniform number times a sum and the sum
constexpr double kBelowOne = 1 - 0x1p-52;

// By the inverse of the distribution function: the first class up to which there is more than a uniform number of
// [0, 1) times the whole, so that none of probability 0 is drawn.
template <class T, bool MIXED>
void draw(Sites<T, SiteALane<T>, MIXED>& sites, const CategoricalProblem& p, const double* uniforms, Drawn<T>* drawn) {
  constexpr int n = SiteALane<T>::kAtOnce;
  T weights[n];
  double whole[n] = {}, sum[n] = {}, at[n], place[n] = {};
  sites.pass([&](int i) {
    sites.weights(i, 0, weights);
    for (int l = 0; l < n; ++l) whole[l] += double(weights[l]);
  });
  for (int l = 0; l < n; ++l) at[l] = whole[l] * (uniforms[l] * kBelowOne);
  sites.pass([&](int i) {
    sites.weights(i, 0, weights);
    for (int l = 0; l < n; ++l) {
      sum[l] += double(weights[l]);
      place[l] += sum[l] <= at[l] ? 1.0 : 0.0;
    }
  });
  for (int l = 0; l < n; ++l) {
    const int64_t k = int64_t(place[l]);
    drawn[l] = {k < p.classes ? k : p.classes - 1, T(whole[l] - whole[l] + 1)};
  }
}

template <class T, bool MIXED>
void draw(Sites<T, SiteAtATime<T>, MIXED>& sites, const CategoricalProblem&, const double* uniforms, Drawn<T>* drawn) {
  using V = Wide<T>;
  constexpr int n = lanes<V>();
  T weights[n];
  double whole = 0, sum = 0;
  int64_t first = 0, place = 0;
  sites.pass([&](int i) {
    sites.weights(i, first += n, weights);
    whole += sum_of_lanes<T>(load_lanes<V>(weights));
  });
  const double at = whole * (uniforms[0] * kBelowOne);
  bool found = false;
  first = 0;
  sites.pass([&](int i) {
    if (found) return;
    sites.weights(i, first + n, weights);
    const double more = sum_of_lanes<T>(load_lanes<V>(weights));
    found = sum + more > at;
    for (int l = 0; found && l < n && !(sum > at); ++l) {
      sum += double(weights[l]);
      // added up in another order, they may not come to it
      if (weights[l] > 0) place = first + l;
    }
    if (!found) sum += more;
    first += n;
  });
  *drawn = {place, T(whole - whole + 1)};
}

// One-hot vectors.
template <class T, class S>
void write_drawn(const PlaneOperand& o, const Tile& t, const Drawn<T>* drawn) {
  S* data = static_cast<S*>(o.op.data);
  const int64_t inner = o.op.stride[t.space.ndim - 1];
  for_runs(t, o.op.stride, [&](int at, int n, int64_t offset) {
    if (o.step == 1 && (n == 1 || inner == o.count)) {
      std::memset(data + offset, 0, sizeof(S) * size_t(n) * size_t(o.count));
    } else {
      for_planes(o, inner, 0, n, offset, 1, [&](int64_t to, int64_t step, int count, int64_t, int64_t) {
        for (int k = 0; k < count; ++k) data[to + k * step] = Store<S>::from(T(0));
      });
    }
    for (int i = 0; i < n; ++i) {
      const auto& [place, value] = drawn[at + i];
      data[offset + i * inner + place * o.step] = Store<S>::from(value);
    }
  });
}

template <class T, class L, bool MIXED>
void forward(const CategoricalProblem& p, const Tile& t) {
  Sites<T, L, MIXED> sites(p, t);
  sites.sum_up();
  if (p.out_z.data) {
    double uniforms[L::kAtOnce] = {};
    Drawn<T> drawn[L::kAtOnce];
    read_sites(p.uniforms, t, uniforms);
    draw(sites, p, uniforms, drawn);
    visit(p.out_z.dtype, [&](auto tag) {
      write_drawn<T, typename decltype(tag)::type>({p.out_z, p.out_z_step, int(p.classes)}, t, drawn);
    });
  }
  if (!p.kl) return;
  T kl[lanes<Wide<T>>()];
  store_lanes(sites.kl(), kl);
  write_sites(p.out_kl, t, kl);
}

template <class T, class L, bool MIXED>
void backward(const CategoricalProblem& p, const Tile& t) {
  using V = Wide<T>;
  Sites<T, L, MIXED> sites(p, t);
  sites.sum_up();
  T dkl[lanes<V>()] = {};
  if (p.kl) read_sites(p.dkl, t, dkl);
  const V g = L::kAtOnce == 1 ? V(dkl[0]) : load_lanes<V>(dkl);
  sites.differentiate(g * lit<V>(p.dkl_scale), g * lit<V>(p.dkl_prior_scale));
}

template <class T, class L, bool MIXED>
void run(const CategoricalProblem& p, int64_t begin, int64_t end) {
  for (int64_t site = begin; site < end; site += L::kAtOnce) {
    const Tile t{p.space, site, int(end - site < L::kAtOnce ? end - site : L::kAtOnce)};
    p.backward ? backward<T, L, MIXED>(p, t) : forward<T, L, MIXED>(p, t);
  }
}

template <class T, class L>
void run(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.uniform.wide != 0 ? run<T, L, true>(p, begin, end) : run<T, L, false>(p, begin, end);
}

}  // namespace

template <class T>
void run_categorical(const CategoricalProblem& p, int64_t begin, int64_t end) {
  p.classes* SiteALane<T>::kAtOnce <= kBlock ? run<T, SiteALane<T>>(p, begin, end)
                                             : run<T, SiteAtATime<T>>(p, begin, end);
}

template void run_categorical<float>(const CategoricalProblem&, int64_t, int64_t);
template void run_categorical<double>(const CategoricalProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
