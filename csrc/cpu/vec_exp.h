// Exponentials and logarithms for at::vec::Vectorized, built on vmath.h's polynomials. Inline: a library call would
// spill every register around it.
#pragma once

#include <limits>

#include "cpu/vec.h"

#if !defined(VF_ONE_LANE)

namespace vaefast {
inline namespace VF_ISA {

// e^y, and what exp_terms reads of its way there. y = n log 2 + r with |r| <= log(2) / 2 or, where SMALL and y is near
// 0, n = 0; Q is what e^r is beside 1 + r.
// @ exp_parts<SMALL>.root | y in [-inf, inf] | 1 ulp | -inf: 0; inf: inf
// @ exp_parts<SMALL>.r | y in [-0.6999, 0.6999] | 0 ulp
// @ exp_parts<SMALL>.Q | y in [-0.6999, 0.6999] | 2 ulp
template <class V>
struct Exp {
  V root, r, Q;
};

template <bool SMALL, class V>
VF_HD Exp<V> exp_parts(V y) {
  constexpr bool wide = kDouble<V>;
  constexpr double limit = wide ? 1416 : 174;  // far into overflow and underflow, but ldexp_ can still halve n
  constexpr double head = wide ? kLog2Head : kLog2HeadShort, tail = wide ? kLog2Tail : kLog2TailShort;
  const V c = clamp_(y, lit<V>(-limit), lit<V>(limit));
  V n = rint_(c * lit<V>(1.44269504088896340736));
  if constexpr (SMALL) n = select(less(abs_(y), lit<V>(kNearRoot)), lit<V>(0), n);
  const V r = fma_(n, lit<V>(-tail), fma_(n, lit<V>(-head), c)), square = r * r, q = exp_tail<!SMALL>(r);
  return {ldexp_(lit<V>(1) + fma_(square, q, r), n), r, square * q};
}

template <class T>
VF_HD Vec<T> exp_(Vec<T> x) {
  return exp_parts<false>(x).root;
}

template <class T>
VF_HD LogParts<Vec<T>> log_parts(Vec<T> x) {
  using V = Vec<T>;
  using I = Vec<IntOf<T>>;
  const I offset(sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  const I e = (bits_of(x) - offset) >> I(kMantissa<T>);
  const V magic(T(int64_t(3) << (kMantissa<T> - 1)));  // adding a whole number to its bits adds it to the number
  const V mantissa = from_bits<T>(bits_of(x) - (e << I(kMantissa<T>)));
  return {mantissa + (x - x), from_bits<T>(bits_of(magic) + e) - magic};
}

// log x = exponent log 2 + 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172
template <class T>
VF_HD Vec<T> log_unit(Vec<T> x) {
  using V = Vec<T>;
  const auto p = log_parts(x);
  const V one = lit<V>(1), s = (p.mantissa - one) * reciprocal(p.mantissa + one);
  return fma_(p.exponent, lit<V>(0.693147180559945309417), twice_atanh(s));
}

// of any x
template <class T>
VF_HD Vec<T> log_(Vec<T> x) {
  using V = Vec<T>;
  // x - x is NaN where x is, and where it is infinite
  if (all(less_equal(V(std::numeric_limits<T>::min()), x - (x - x)))) return log_unit(x);
  // subnormal numbers are scaled up first; the rest goes by what the standard says
  constexpr double scale = sizeof(T) == 4 ? 0x1p64 : 0x1p512, logscale = sizeof(T) == 4 ? 64 : 512;
  const V zero = lit<V>(0), inf = V(std::numeric_limits<T>::infinity());
  const auto tiny = less(x, V(std::numeric_limits<T>::min()));
  const V y = log_unit(select(tiny, x * lit<V>(scale), x));
  const V found = select(tiny, y - lit<V>(logscale * 0.693147180559945309417), y);
  const V above = select(less(x, inf), found, x);
  const V nan = V(std::numeric_limits<T>::quiet_NaN());
  return select(less(zero, x), above, select(equal(x, zero), zero - inf, nan));
}

template <class T>
VF_HD ExpTerms<Vec<T>> exp_terms(Vec<T> x) {
  const auto e = exp_parts<true>(x * lit<Vec<T>>(0.5));
  return exp_terms(x, e.root, e.r, e.Q);
}

#if defined(CPU_CAPABILITY_AVX512)
template <class T>
VF_HD Wide<T> exp_(Wide<T> x) {
  return exp_parts<false>(x).root;
}
VF_EACH_1(log_)
template <class T>
VF_HD LogParts<Wide<T>> log_parts(Wide<T> x) {
  const auto a = log_parts(x.a), b = log_parts(x.b);
  return {{a.mantissa, b.mantissa}, {a.exponent, b.exponent}};
}
template <class T>
VF_HD ExpTerms<Wide<T>> exp_terms(Wide<T> x) {
  const auto e = exp_parts<true>(x * lit<Wide<T>>(0.5));
  return exp_terms(x, e.root, e.r, e.Q);
}
#endif

}  // namespace VF_ISA
}  // namespace vaefast

#endif  // VF_ONE_LANE
