// Gamma functions for likelihoods of counts and heavy tails, generic in V as vmath.h is.
//
// log Gamma itself is never formed: at a count of 10^6 it is 10^7, and the differences that a likelihood takes would
// keep no digit of float32. All goes through S, what Stirling's formula leaves:
//   log Gamma(z + 1) = (z + 1/2) log z - z + log(2 pi) / 2 + S(z),   psi(z) = log z - 1 / (2 z) + S'(z)
// whose large terms cancel on paper (Loader 2000, "Fast and Accurate Computation of Binomial Probabilities").
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

constexpr double kLog2 = 0.69314718055994530942;
constexpr double kHalfLog2Pi = 0.91893853320467274178;
constexpr double kNaN = __builtin_nan("");

// S(z) and S'(z)
template <class V>
struct Stirling {
  V value, slope;
};

// @ stirling_from_one.value | z in [1, 2^100] | 1e-8 / 3e-17
// @ stirling_from_one.slope | z in [1, 2^100] | 6e-8 / 1e-16
template <class V>
VF_HD Stirling<V> stirling_from_one(V z) {
  if constexpr (kDouble<V>) {
    // With s = 1 / (2 z + 1): S(z) - S(z + 1) = atanh(s) / s - 1, term by term. Nine steps up, the series at 10 or
    // more.
    const V one = lit<V>(1);
    V value = lit<V>(0), slope = lit<V>(0);
    VF_ROLLED
    for (int k = 0; k < 9; ++k) {
      const V s = one / (z + z + one), y = s * s, tail = atanh_tail(y);
      value = fma_(y, tail, value);
      slope = fma_((s + s) * y, tail - one / (one - y), slope);
      z = z + one;
    }
    const V u = one / z, y = u * u;
    value = fma_(u,
                 polynomial(y, 1.0 / 12, -1.0 / 360, 1.0 / 1260, -1.0 / 1680, 1.0 / 1188, -691.0 / 360360, 1.0 / 156,
                            -3617.0 / 122400),
                 value);
    slope = fma_(
        y,
        polynomial(y, -1.0 / 12, 1.0 / 120, -1.0 / 252, 1.0 / 240, -1.0 / 132, 691.0 / 32760, -1.0 / 12, 3617.0 / 8160),
        slope);
    return {value, slope};
  } else {
    // in u = 1 / z on (0, 1], to 3e-9 and 4e-8; tools/coefficients.py makes them
    const V u = reciprocal(z);
    return {
        u * polynomial(u, 0.08333329856395721, 6.941178867236886e-07, -0.0027791066095232964, -3.1928862881613895e-05,
                       0.0010151166934520006, -0.0006068689399398863, 0.0001302640448557213),
        u * u *
            polynomial(u, -0.08333329856395721, -2.326731419088901e-06, 0.008350503630936146, 6.37648772681132e-05,
                       -0.004938007798045874, 0.0035064141266047955, -0.0008627526112832129)};
  }
}

// What S(z) and S'(z) are more than at z + 1, given 1 / z and 1 / (z + 1).
// @ stirling_step(z,1/z,1/(z+1)).value | z in [tiny, 1] | 3e-7 + 2 ulp / 6e-16 + 2 ulp
// @ stirling_step(z,1/z,1/(z+1)).slope | z in [tiny, 1] | 2e-7 + 6 ulp / 4e-16 + 6 ulp
template <class V>
VF_HD Stirling<V> stirling_step(V z, V inverse, V inverse_up) {
  const V middle = z + lit<V>(0.5), log = log_((z + lit<V>(1)) * inverse);
  return {fma_(middle, log, lit<V>(-1)), log - middle * inverse * inverse_up};
}

// @ stirling.value | z in [tiny, 2^100] | 2e-7 + 2 ulp / 4e-16 + 2 ulp
// @ stirling.slope | z in [tiny, 2^100] | 6e-8 + 6 ulp / 1e-16 + 6 ulp
template <class V>
VF_HD Stirling<V> stirling(V z) {
  const V one = lit<V>(1), zero = lit<V>(0);
  const auto small = less(z, one);
  const V up = select(small, z + one, z);
  Stirling<V> s = stirling_from_one(up);
  if (any(small)) {
    const auto step = stirling_step(z, one / z, reciprocal(up));
    s.value = s.value + select(small, step.value, zero);
    s.slope = s.slope + select(small, step.slope, zero);
  }
  return s;
}

// log Gamma(x + 1) - (x log x - x), given log x
// @ factorial_excess(x,log(x)) | x in [tiny, 2^100] | 3e-7 + 1 ulp / 6e-16 + 1 ulp
template <class V>
VF_HD V factorial_excess(V x, V log_x) {
  const V one = lit<V>(1), up = x + one;
  const auto small = less(x, one);
  const V s = stirling_from_one(select(small, up, x)).value + lit<V>(kHalfLog2Pi);
  const V value = fma_(lit<V>(0.5), log_x, s);
  if (!any(small)) return value;
  return select(small, s - fma_(x, log_x, one) + (x + lit<V>(0.5)) * log_(up), value);
}

// x, or NaN where it is negative and no count
// @ count_of | x in [0, inf] | 0 ulp | -1: nan; 0: 0; inf: inf
template <class V>
VF_HD V count_of(V x) {
  return select(less(x, lit<V>(0)), lit<V>(kNaN), x);
}

// x, or NaN where it is outside [0, 1]
// @ in_unit | x in [0, 1] | 0 ulp | -1: nan; 2: nan; inf: nan
template <class V>
VF_HD V in_unit(V x) {
  return select(less(x, lit<V>(0)), lit<V>(kNaN), select(less(lit<V>(1), x), lit<V>(kNaN), x));
}

// The minus log probability of a count x >= 0 under the negative binomial of mean mu = m + eps > 0 and inverse
// dispersion theta, and its derivatives. Without `constant`, log Gamma(x + 1) is left out.
// @ negative_binomial.nll | m in [1e-6, 1e6], theta in [1e-6, 1e6], x in [1, 1e6] or 0 | 2e-6 / 1e-14 of 1 or more
// @ negative_binomial.dmu | m in [1e-6, 1e6], theta in [1e-6, 1e6], x in [1, 1e6] or 0 | 2e-6 / 1e-14 of 1 or more
// @ negative_binomial.dtheta | m in [1e-6, 1e6], theta in [1e-6, 1e6], x in [1, 1e6] or 0 | 2e-6 / 1e-14 of 1 or more
template <class V>
struct CountTerm {
  V nll, dmu, dtheta;
};

// With N = x + theta and y = (x - mu) / (theta + mu),
//   nll = theta (y - log(1 + y)) + (x log(x (theta + mu) / (mu N)) - theta y)
//         + S(theta) - S(N) + log(N / theta) / 2 + (log Gamma(x + 1) - x log x + x)
// Both deviances vanish with x - mu, and so do their series in s, where log(1 + y) = 2 atanh(s). From theta = 1e30 on
// it is a Poisson.
template <class V>
VF_HD CountTerm<V> negative_binomial(V m, V eps, V dispersion, V x, bool constant) {
  const V theta = at_most(dispersion, lit<V>(1e30));
  const V mu = m + eps, zero = lit<V>(0), half = lit<V>(0.5), third = lit<V>(1.0 / 3);
  const V total = theta + mu, N = theta + x, inverse = lit<V>(1) / total, off = x - mu, y = off * inverse;
  const V s = off / (total + N);
  const auto near = less_equal(abs_(s), third);
  const V deviance = select(near, fma_(s, y, zero - atanh_excess(s)), y - log_(N * inverse));
  const auto none = equal(x, zero);
  // of a dispersion without end all are 0, whatever the mean, if it is a number, and so is x
  const V one = lit<V>(1);
  CountTerm<V> t{select(equal(theta, zero), select(equal(off, off), zero, off), theta * (deviance - y)),
                 theta * inverse * select(none, one, zero - off / mu), deviance};
  if (!any(less(zero, x))) return t;
  // at 1 where x is 0 and this is not read: the slow paths are for what comes
  const V k = select(none, one, x), M = theta + k, by_theta = one / theta, by_M = reciprocal(M);
  const V s2 = theta * (k - mu) / fma_(k, total, mu * M);
  const auto near2 = less_equal(abs_(s2), third), small = less(theta, one);
  const V up = select(small, theta + one, theta), by_up = reciprocal(up);
  const auto a = stirling_from_one(up), b = stirling(M);
  V deviance2, data = zero;
  if (constant) {
    deviance2 =
        fma_(theta * y, select(near2, s2, lit<V>(-1)), k * select(near2, atanh_excess(s2), log_(k * total / (mu * M))));
    data = factorial_excess(k, log_(k));
  } else {
    // the same with k - k log k, which is far larger than the rest
    const V r = M * inverse * mu;
    deviance2 = fma_(zero - k, log_(r), r);
  }
  V value = a.value - b.value, dtheta = deviance - half * k * by_theta * by_M + (a.slope - b.slope);
  if (any(small)) {
    // M / total - 1 / theta, and the logarithms: large numbers that may cancel
    const V whole = fma_(theta, theta, fused_(theta, k - one, zero - m) - eps) * by_theta * inverse - one;
    const V logs = log_(up * total * by_theta * by_M), halves = half * (by_M - by_up);
    value = value + select(small, stirling_step(theta, by_theta, by_up).value, zero);
    dtheta = select(small, whole + logs + halves + (a.slope - b.slope), dtheta);
  }
  const V nll = fma_(theta, deviance, deviance2) + value + fma_(half, log_(M * by_theta), data);
  t.nll = select(none, t.nll, nll);
  t.dtheta = select(none, t.dtheta, dtheta);
  return t;
}

// One cell of a table of counts: log(O / E) of what was observed and expected there, and O log(O / E) - (O - E) >= 0,
// given off = O - E.
// @ deviance(O,E,O-E).log | O in [1e-6, 1e6], E in [1e-6, 1e6] | 3 ulp + 4e-9 / 3 ulp | (0, 1): -inf
// @ deviance(O,E,O-E).value | O in [1e-6, 1e6], E in [1e-6, 1e6] | 2 ulp of the terms | (0, 1): 1
template <class V>
struct Deviance {
  V log, value;
};

template <class V>
VF_CALLED Deviance<V> deviance(V O, V E, V off) {
  const V zero = lit<V>(0), s = off / (O + E);
  const auto near = less_equal(abs_(s), lit<V>(1.0 / 3)), none = equal(O, zero);
  const V log = select(near, twice_atanh(s), log_(O / E));
  return {log, select(near, fma_(off, s, O * atanh_excess(s)), select(none, zero, O * log) - off)};
}

// log Gamma(k + 1) + log Gamma(a) - log Gamma(k + a), less its logarithms of large numbers:
//   k log(k / A) + a log(a / A) + log(factor) / 2 + rest - log(least),   A = k + a
// and psi(a) = log(up) + dup - 1 / least where a < 1, there with up = a + 1, else without the last; psi(A) = log(top) +
// dtop. All is 0, and 1 in a logarithm, at k = 0.
// @ rising_term.rest | whole k in [0, 999], a in [1e-6, 1e6] | 1e-6 / 2e-15 | (0, 3): 0
// @ rising_term.factor | whole k in [0, 999], a in [1e-6, 1e6] | 2 ulp | (0, 3): 1
// @ rising_term.least | whole k in [0, 999], a in [1e-6, 1e6] | 0 ulp | (0, 3): 1; (1, 3): 1
// @ rising_term.up | whole k in [0, 999], a in [1e-6, 1e6] | 0.5 ulp | (0, 3): 1
// @ rising_term.dup | whole k in [0, 999], a in [1e-6, 1e6] | 2e-7 / 4e-16 | (0, 3): 0
// @ rising_term.top | whole k in [0, 999], a in [1e-6, 1e6] | 0.5 ulp | (0, 3): 1
// @ rising_term.dtop | whole k in [0, 999], a in [1e-6, 1e6] | 2e-7 / 4e-16 | (0, 3): 0
template <class V>
struct RisingTerm {
  V rest, factor, least, up, dup, top, dtop;
};

template <class V>
VF_CALLED RisingTerm<V> rising_term(V k, V a) {
  const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(0.5), A = k + a;
  const auto none = equal(k, zero), small = less(a, one);
  const V up = select(small, a + one, a);
  const auto s = stirling_from_one(up), t = stirling(A);
  V rest = s.value - t.value + stirling(select(none, one, k)).value + lit<V>(kHalfLog2Pi);
  if (any(small)) rest = rest + select(small, fma_(a, log_(up / a), fma_(half, log_(up), lit<V>(-1))), zero);
  const V factor = k * (A / select(small, one, a));
  return {select(none, zero, rest),
          select(none, one, factor),
          select(none, one, select(less_equal(one, a), one, a)),
          select(none, one, up),
          select(none, zero, s.slope - half / up),
          select(none, one, A),
          select(none, zero, t.slope - half / A)};
}

// The minus log probability of x of n trials under the beta-binomial of alpha = a and beta = b, and its derivatives.
template <class V>
struct TrialsTerm {
  V nll, da, db, dn;
};

// The table of x, n - x and a, b has the row sums n and a + b; all logarithms of large numbers make up the deviance of
// its four cells, each off by the same number from what its row and its column lead to.
// @ beta_binomial(n=x+y).nll | a and b in [1e-6, 1e6], whole x and y in [0, 999] | 2e-6 / 1e-14 of 1 or more
// @ beta_binomial(n=x+y).da | a and b in [1e-6, 1e6], whole x and y in [0, 999] | 2e-6 / 1e-14 of 1 or more
// @ beta_binomial(n=x+y).db | a and b in [1e-6, 1e6], whole x and y in [0, 999] | 2e-6 / 1e-14 of 1 or more
// @ beta_binomial(n=x+y).dn | a and b in [1e-6, 1e6], whole x and y in [0, 999] | 2e-6 / 1e-14 of 1 or more
template <class V>
VF_HD TrialsTerm<V> beta_binomial(V a, V b, V x, V n) {
  const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(0.5);
  const V y = n - x, c = a + b, A = x + a, B = y + b, N = n + c;
  // (x b - y a) / N, each product's rounding made good
  const V product = y * a, lost = fused_(zero - y, a, product);
  const V off = (fused_(x, b, zero - product) + lost) / N, minus = zero - off;
  const V part = A / N, others = B / N;
  const auto at_x = deviance(x, n * part, off), at_y = deviance(y, n * others, minus);
  const auto at_a = deviance(a, c * part, minus), at_b = deviance(b, c * others, off);
  const auto u = rising_term(x, a), v = rising_term(y, b), w = rising_term(n, c);
  const V factors = (u.factor / w.factor) * v.factor, least = (u.least / w.least) * v.least;
  const V nll = ((at_x.value + at_y.value) + (at_a.value + at_b.value)) + (u.rest + v.rest - w.rest) +
                (half * log_(factors) - log_(least));
  TrialsTerm<V> t{nll, zero, zero, zero};
  // psi(a) - psi(A) - psi(c) + psi(N), with logarithms that the table has where nothing was moved up
  const auto moved_a = less(a, one), moved_b = less(b, one), moved_c = less(c, one);
  const auto no_x = equal(x, zero), no_y = equal(y, zero), no_n = equal(n, zero);
  const V log_a = select(moved_a, log_((u.up / u.top) * (w.top / w.up)), at_a.log);
  const V log_b = select(moved_b, log_((v.up / v.top) * (w.top / w.up)), at_b.log);
  const V inverse_c = select(no_n, zero, select(moved_c, one / c, zero));
  const V pole_a = select(no_x, zero - inverse_c, select(moved_c, b / (a * c), select(moved_a, one / a, zero)));
  const V pole_b = select(no_y, zero - inverse_c, select(moved_c, a / (b * c), select(moved_b, one / b, zero)));
  t.da = log_a + (u.dup - u.dtop - (w.dup - w.dtop)) - pole_a;
  t.db = log_b + (v.dup - v.dtop - (w.dup - w.dtop)) - pole_b;
  // -psi(n + 1) + psi(y + 1) - psi(B) + psi(N), psi(k + 1) = log k + 1 / (2 k) + S'(k), and psi(1) = psi(2) - 1
  const V some_y = select(no_y, one, y), some_n = select(no_n, one, n);
  const V log_n = select(no_y, log_((some_y / some_n) * (N / B)), at_y.log);
  const V up = fma_(half, one / some_y - one / some_n, stirling(some_y).slope - stirling(some_n).slope);
  const V down = fma_(half, one / B - one / N, stirling(N).slope - stirling(B).slope);
  t.dn = log_n + (up + down) + (select(no_n, one, zero) - select(no_y, one, zero));
  return t;
}

}  // namespace VF_ISA
}  // namespace vaefast
