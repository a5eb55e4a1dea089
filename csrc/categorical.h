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
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

// |d| below which e^d - 1 and h(d) go by a series, and S up to which it is what t - s is made of
constexpr double kNearBy = 2 * kNearRoot, kSmallSum = 16;

// Stands for d where s is 0: above every difference, and not so large that 0 times it times a gradient is NaN.
constexpr double kApart = 1e20;
// and how far below its largest logit one of p's counts, beside a uniform share
constexpr double kLeast = 1e4;

// of a uniform number of [0, 1) that a sum is multiplied by, so that the product is less than the sum
constexpr double kBelowOne = 1 - 0x1p-52;

// Numbers added up in chains that are short: equal ones are rounded alike, all in one direction.
template <class V>
class Chains {
 public:
  VF_HD void add(V x) {
    last_ = last_ + x;
    if (++count_ % 8 != 0) return;
    before_ = before_ + last_;
    last_ = lit<V>(0);
    if (count_ % 64 != 0) return;
    whole_ = whole_ + before_;
    before_ = lit<V>(0);
  }
  VF_HD V total() const { return whole_ + (before_ + last_); }

 private:
  V last_ = lit<V>(0), before_ = lit<V>(0), whole_ = lit<V>(0);
  int count_ = 0;
};

// Some sites. What reads them (Lay) holds `Numbers`, of a piece of their classes, in V's that it numbers as it likes:
//   piece()                classes of a piece
//   for_each(count, f)     f(number of a V) for each that so many classes take
//   read, write            (operand, step, first class, count, Numbers); `missing` stands for a class that there is not
//   sum, most              of a site's classes, where those of one V are not a site's each
template <class Lay, bool MIXED>
class Sites {
 public:
  using V = typename Lay::V;

  VF_HD Sites(const CategoricalProblem& p, const Lay& lay)
      : p_(p), lay_(lay), pieces_((p.classes + lay.piece() - 1) / lay.piece()) {
    if (pieces_ == 1) read(0);
  }

  // Exponentials and their sums; with a KL also the mean of d, and S.
  VF_CALLED void sum_up() {
    V most_q = lit<V>(0) - infinity<V>(), most_p = most_q;
    pass([&](int i) {
      most_q = larger(most_q, q_.at(i));
      if (p_.kl) most_p = larger(most_p, prior_.at(i));
    });
    most_q_ = lay_.most(most_q);
    most_p_ = lay_.most(most_p);
    least_p_ = most_p_ - lit<V>(kLeast);
    const V offset = most_p_ - most_q_;
    raw_ = select(less(abs_(offset), lit<V>(1)), lit<V>(1), lit<V>(0));
    advance();
    Chains<V> sum_q, sum_p, sum_d;
    pass([&](int i) {
      const V e = q_.at(i);
      sum_q.add(e);
      if (!p_.kl) return;
      sum_p.add(prior_.at(i));
      sum_d.add(e * d_.at(i));
    });
    inverse_q_ = reciprocal(lay_.sum(sum_q.total()));
    if (!p_.kl) return;
    const V whole_p = lay_.sum(sum_p.total());
    inverse_p_ = reciprocal(whole_p);
    mean_ = lay_.sum(sum_d.total()) * inverse_q_;
    const V shift = select(equal(raw_, lit<V>(0)), lit<V>(0), offset) - mean_, of_t = exp_(shift) * inverse_q_;
    Chains<V> sum;
    pass([&](int i) {
      const V s = q_.at(i) * inverse_q_, d = d_.at(i) - mean_;
      const V far = fma_(prior_.at(i), of_t, lit<V>(0) - fma_(s, d, s));
      sum.add(select(less(abs_(d), lit<V>(kNearBy)), s * near_h(d), far));
    });
    const V one = lit<V>(1);
    sum_ = lay_.sum(sum.total());
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
      kl_ = lay_.sum(sum.total()) * lit<V>(p_.share);
    }
    return kl_;
  }

  // In proportion to q, which is all that drawing asks for.
  VF_HD V weight(int i) const { return MIXED ? fma_(q_.at(i), inverse_q_, lit<V>(p_.uniform)) : q_.at(i); }

  // Gradients from the sample's, which is read, and from the KL's in q and in p.
  VF_CALLED void differentiate(V of_q, V of_p) {
    of_q_ = of_q;
    if (pieces_ == 1) read_upstream(0);
    advance();
    Chains<V> sum_q, sum_p;
    pass([&](int i) {
      sum_q.add(q_.at(i) * upstream_.at(i));
      if (MIXED && p_.kl) sum_p.add(prior_.at(i) * d_.at(i));
    });
    const V mean_q = lay_.sum(sum_q.total()), mean_p = lay_.sum(sum_p.total());
    const V share = lit<V>(p_.share), share_p = share * of_p;
    pass(
        [&](int i) {
          q_.put(i, share * q_.at(i) * (upstream_.at(i) - mean_q));
          if (!p_.kl) return;
          const V g = d_.at(i);
          prior_.put(i, MIXED ? share_p * prior_.at(i) * (g - mean_p) : of_p * g);
        },
        [&](int64_t piece) {
          lay_.write(p_.out_dlogits, p_.out_dlogits_step, piece * lay_.piece(), count(piece), q_);
          if (p_.kl) lay_.write(p_.out_dprior, p_.out_dprior_step, piece * lay_.piece(), count(piece), prior_);
        });
  }

  // f(number in a piece) for each V, and g(piece) behind each piece.
  template <class F, class G>
  VF_HD void pass(const F& f, const G& g) {
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      if (pieces_ > 1) bring(piece);
      lay_.for_each(count(piece), f);
      g(piece);
    }
  }
  template <class F>
  VF_HD void pass(const F& f) {
    pass(f, [](int64_t) {});
  }

 private:
  using Numbers = typename Lay::Numbers;

  VF_HD int count(int64_t piece) const {
    const int64_t left = p_.classes - piece * lay_.piece();
    return int(left < lay_.piece() ? left : lay_.piece());
  }

  VF_HD void read(int64_t piece) {
    const int64_t first = piece * lay_.piece();
    const double never = -HUGE_VAL;
    lay_.read(p_.logits, p_.logits_step, first, count(piece), q_, never);
    if (p_.kl) lay_.read(p_.prior, p_.prior_step, first, count(piece), prior_, never);
  }

  VF_HD void read_upstream(int64_t piece) {
    lay_.read(p_.dz, p_.dz_step, piece * lay_.piece(), count(piece), upstream_, 0);
  }

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
    lay_.for_each(count(piece), [&](int i) {
      const V l = q_.at(i), down_q = l - most_q_, e = exp_down(down_q);
      q_.put(i, e);
      if (!p_.kl) return;
      V m = prior_.at(i);
      if constexpr (MIXED) m = larger(m, least_p_);
      const V down_p = m - most_p_;
      prior_.put(i, exp_down(down_p));
      const V d = select(equal(raw_, lit<V>(0)), down_p - down_q, m - l);
      d_.put(i, select(equal(e, lit<V>(0)), lit<V>(kApart), d));
    });
  }

  // In their place the softmaxes, in d's what p's gradient is made of, and in the sample's that of q's.
  VF_CALLED void terms(int64_t piece) {
    lay_.for_each(count(piece), [&](int i) {
      const V e_q = q_.at(i), v = upstream_.at(i);
      if (p_.kl) {
        const V e_p = prior_.at(i);
        const Apart a = apart(i);
        upstream_.put(i, fma_(lit<V>(0) - of_q_, a.ratio, v));
        d_.put(i, a.of_p);
        prior_.put(i, e_p * inverse_p_);
      }
      q_.put(i, e_q * inverse_q_);
    });
  }

  // Of one class: its term of the KL, log(p / q) but for what all classes have in common, and what the gradient in p's
  // logits is made of.
  struct Apart {
    V kl, ratio, of_p;
  };

  VF_HD Apart apart(int i) const {
    const V s = q_.at(i) * inverse_q_, t = prior_.at(i) * inverse_p_, d = d_.at(i) - mean_;
    const auto near = less(abs_(d), near_);
    const V x = select(near, s * ((d + near_h(d)) - sum_) * inverse_, t - s);
    if constexpr (!MIXED) {
      return {x, d, x};
    } else {
      const V one = lit<V>(1), u = lit<V>(p_.uniform);
      // q + x would be rounded as a number of q's size is, also where p is much smaller
      const V q = s + u, moved = q + x, own = t + u, p = select(near, select(less(moved + moved, q), own, moved), own);
      const auto r = log_parts(p * reciprocal(q));
      const auto close = equal(r.exponent, lit<V>(0));
      // log(p / q) = exponent log 2 + 2 atanh(a)
      const V a = select(close, x, r.mantissa - one) * reciprocal(select(close, p + q, r.mantissa + one));
      const V whole = r.exponent * lit<V>(0.693147180559945309417), excess = atanh_excess(a);
      const V apart = fma_(lit<V>(0) - q, whole + (a + a), x);
      return {fma_(lit<V>(0) - q, excess, select(close, x * a, apart)), whole + ((a + a) + excess), x * reciprocal(p)};
    }
  }

  // e^x - 1 - x for |x| < kNearBy
  static VF_HD V near_h(V x) {
    const V y = x * lit<V>(0.5), square = y * y, Q = square * exp_tail(y);
    return fma_(Q, fma_(y, lit<V>(2), Q + lit<V>(2)), square);
  }

  // e^x for x <= 0; no subnormal numbers, which would cost a CPU some hundred cycles an operation.
  static VF_HD V exp_down(V x) { return select(less(x, lit<V>(kDouble<V> ? -708 : -87)), lit<V>(0), exp_(x)); }

  static VF_HD V larger(V a, V b) { return select(less(a, b), b, a); }

  const CategoricalProblem& p_;
  const Lay& lay_;
  const int64_t pieces_;
  int steps_ = 0;
  V most_q_, most_p_, least_p_, raw_, inverse_q_, inverse_p_, mean_, sum_, near_, inverse_, kl_, of_q_;
  Numbers q_, prior_, d_, upstream_;
};

}  // namespace VF_ISA
}  // namespace vaefast
