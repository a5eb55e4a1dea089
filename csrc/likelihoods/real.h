// Likelihoods: Of real data.
#pragma once

#include "likelihoods/term.h"
#include "special.h"

namespace vaefast {
inline namespace VF_ISA {

// Its option is 1 where the constant is in, else 0.
struct Gaussian {
  static constexpr const char* name = "gaussian";
  static constexpr int required = 1, params = 2, options = 1;

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V d = p[0] - x;
    return {fma_(lit<V>(0.5) * d, d, lit<V>(kHalfLog2Pi) * lit<V>(o[0])), {d}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    const V half = lit<V>(0.5), one = lit<V>(1), constant = lit<V>(kHalfLog2Pi) * lit<V>(o[0]), off = p[0] - x;
    // of a variance that vanishes nothing is left at the mean, and all beside it
    const V inverse = select(equal(off, lit<V>(0)), one, exp_(p[1] * lit<V>(-0.5))), d = off * inverse;
    const V twice = select(less(abs_(d), infinity<V>()), fma_(d, d, p[1]), abs_(d));
    return {fma_(half, twice, constant), {d * inverse, half * fma_(lit<V>(0) - d, d, one)}};
  }
};

struct Laplace {
  static constexpr const char* name = "laplace";
  static constexpr int required = 1, params = 2, options = 1;  // as Gaussian's

  template <class V>
  static VF_HD V sign(V d) {
    const V zero = lit<V>(0);
    return select(less(zero, d), lit<V>(1), select(less(d, zero), lit<V>(-1), d));
  }

  template <class V>
  static VF_HD Term<V, 1> eval(const V (&p)[1], V x, const Options& o) {
    const V d = p[0] - x;
    return {abs_(d) + lit<V>(kLog2) * lit<V>(o[0]), {sign(d)}};
  }

  template <class V>
  static VF_HD Term<V, 2> eval(const V (&p)[2], V x, const Options& o) {
    const V d = p[0] - x, inverse = select(equal(d, lit<V>(0)), lit<V>(1), exp_(lit<V>(0) - p[1])),
            a = abs_(d) * inverse;
    const V scaled = select(less(a, infinity<V>()), a + p[1], a);
    return {scaled + lit<V>(kLog2) * lit<V>(o[0]), {sign(d) * inverse, lit<V>(1) - a}};
  }
};

struct StudentT {
  static constexpr const char* name = "student_t";
  static constexpr bool large = true, single = true;
  static constexpr int required = 3, params = 3;  // df = p[2]

  // With a = df / 2 and b = a + 1/2, log Gamma(a) - log Gamma(b) + log(a) / 2 = 1/2 - a log(b / a) + S(a) - S(b). Of
  // q = d^2 / df, which may overflow, the smaller of q and 1 / q is added to 1. From df = 1e30 on it is a Gaussian.
  // Divisions are dear and 1 / df is in many: b / a and (df + 1) / df are 1 + 1 / df.
  template <class V>
  static VF_HD Term<V, 3> eval(const V (&p)[3], V x) {
    const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(0.5), infinite = infinity<V>();
    const V df = at_most(p[2], lit<V>(1e30)), a = half * df, b = a + half, off = p[0] - x;
    const V inverse = select(equal(off, zero), one, exp_(zero - p[1])), d = off * inverse;
    const V part = one / df, whole = one + part, q = d * (d * part);
    const auto near = less_equal(q, one), huge = less(lit<V>(1e30), q), few = less(a, half);
    V log_q = log_(q);
    if (any(huge)) {
      const V shrunk = d * lit<V>(0x1p-40), log_shrunk = log_(shrunk * (shrunk * part));
      log_q = select(huge, log_shrunk + lit<V>(80 * kLog2Head + 80 * kLog2Tail), log_q);
      const V of_parts = lit<V>(2) * (log_(abs_(off)) - p[1]) - log_(df);
      log_q = select(equal(abs_(d), infinite), of_parts, log_q);
    }
    const V square = select(near, q, one / q), more = one + square, most = one + more;
    const V shared = reciprocal(more * most), rest = most * shared;
    const V tail = twice_atanh(square * (more * shared)) + select(near, zero, log_q);
    const V share = select(near, square * rest, rest), pull = (df + one) * share;  // the nll's slope in log |d|
    const V slope = select(near, whole * d * rest * inverse, pull / off);
    V ratio = twice_atanh(half * reciprocal(a + b));
    if (any(few)) ratio = select(few, log_(whole), ratio);
    const auto at_a = stirling(a), at_b = stirling(b);
    const V norm = fma_(zero - a, ratio, lit<V>(0.5 + kHalfLog2Pi)) + (at_a.value - at_b.value);
    const V dnorm = half * reciprocal(b) - ratio + (at_a.slope - at_b.slope);
    const V nll = select(equal(tail, infinite), tail, fma_(b, tail, norm + p[1]));
    return {nll, {slope, one - pull, half * (dnorm + tail - whole * share)}};
  }
};

using RealLikelihoods = TypeList<Gaussian, Laplace, StudentT>;

}  // namespace VF_ISA
}  // namespace vaefast
