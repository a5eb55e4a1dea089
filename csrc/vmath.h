// Arithmetic written once, generic in V: float or double (host and CUDA), at::vec::Vectorized of either (SIMD units).
//
// The primitives come first (a SIMD unit includes cpu/vec.h, which overloads them, before this file); what is built on
// them follows.
//
// A primitive's contract is a line for each of its results, which tests/test_primitives.py reads and holds on every
// instruction set and in device code:
//   @ name.result | domain | greatest error of float / of double | results at ends of the domain
// An ulp is the last place's of the exact result, a number alone is absolute, and "of the terms" makes either one of
// the sum of the magnitudes that are added. tiny and max are the least and the greatest normal number; a domain that
// reaches below tiny takes subnormal numbers, results are subnormal and not 0 there too, and what is beyond max is inf.
// A NaN gives a NaN, but of a mask or a whole number, which cannot be one.
//
// (Not named math.h: this folder is on the include path, where it would stand in for the system's.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "problems.h"

namespace vaefast {
inline namespace VF_ISA {

// The scalar in a V, and a V that holds a constant.
template <class V>
struct Lane {
  using type = V;
};

template <class V>
VF_HD V lit(double x) {
  return V(static_cast<typename Lane<V>::type>(x));
}

template <class V>
VF_HD V lit(const Number& x) {
  if constexpr (sizeof(typename Lane<V>::type) == 8) {
    return V(x.wide);
  } else {
    return V(x.narrow);
  }
}

template <class V>
VF_HD V infinity() {
  return lit<V>(HUGE_VAL);
}

// @ exp_ | x in [-inf, inf] | 1 ulp | -inf: 0; inf: inf
VF_HD float exp_(float x) { return ::expf(x); }
VF_HD double exp_(double x) { return ::exp(x); }
// @ log_unit | x in [2^-53, 1] | 3 ulp | 1: 0
VF_HD float log_unit(float x) { return ::logf(x); }
VF_HD double log_unit(double x) { return ::log(x); }
// @ log_ | x in [0, inf] | 3 ulp | 0: -inf; inf: inf; -1: nan; -inf: nan
VF_HD float log_(float x) { return ::logf(x); }
VF_HD double log_(double x) { return ::log(x); }
// @ sqrt_ | x in [0, inf] | 0.5 ulp | 0: 0; inf: inf; -1: nan
VF_HD float sqrt_(float x) { return ::sqrtf(x); }
VF_HD double sqrt_(double x) { return ::sqrt(x); }
// @ abs_ | x in [-inf, inf] | 0 ulp | -inf: inf; inf: inf
VF_HD float abs_(float x) { return ::fabsf(x); }
VF_HD double abs_(double x) { return ::fabs(x); }
// The smaller of x and a constant.
// @ at_most | x in [-inf, inf], whole most in [-2, 2] | 0 ulp | (inf, 1): 1; (-inf, 1): -inf; (nan, 1): nan
VF_HD float at_most(float x, float most) { return most < x ? most : x; }
VF_HD double at_most(double x, double most) { return most < x ? most : x; }
// a b + c: rounded once where that is one instruction, a call of many elsewhere. fused_ is for where it has to be.
// @ fused_ | a in [-1e9, 1e9], b in [-1e9, 1e9], c in [-1e18, 1e18] | 0.5 ulp | (1, 1, inf): inf
// @ fma_ | a in [-1e9, 1e9], b in [-1e9, 1e9], c in [-1e18, 1e18] | 1 ulp of the terms | (1, 1, inf): inf
VF_HD float fused_(float a, float b, float c) { return ::fmaf(a, b, c); }
VF_HD double fused_(double a, double b, double c) { return ::fma(a, b, c); }
#if defined(VF_ONE_LANE)
VF_HD float fma_(float a, float b, float c) { return a * b + c; }
VF_HD double fma_(double a, double b, double c) { return a * b + c; }
#else
VF_HD float fma_(float a, float b, float c) { return fused_(a, b, c); }
VF_HD double fma_(double a, double b, double c) { return fused_(a, b, c); }
#endif
// 1 / x
// @ reciprocal | x in [2^-100, 2^100] | 1 ulp | 1: 1
VF_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  // a division takes care of every x, in four times as many instructions
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return ::fmaf(::fmaf(-x, r, 1.0f), r, r);
#else
  return 1 / x;
#endif
}
VF_HD double reciprocal(double x) { return 1 / x; }
// The nearest whole number, of two the even one.
// @ rint_ | x in [-4194303, 4194303] | 0 ulp | 0.5: 0; 1.5: 2; -2.5: -2
#if defined(VF_ONE_LANE)
// what adding 1.5 * 2^mantissa rounds away; ::rint is a call
VF_HD float rint_(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
VF_HD double rint_(double x) { return (x + 0x1.8p52) - 0x1.8p52; }
#else
VF_HD float rint_(float x) { return ::rintf(x); }
VF_HD double rint_(double x) { return ::rint(x); }
#endif
// Comparisons for select(): on a vector they give what its instruction set keeps masks in. With a NaN none holds.
// @ less | a in [-inf, inf], b in [-inf, inf] | mask | (-inf, inf): 1; (inf, inf): 0; (nan, 1): 0; (1, nan): 0
// @ less_equal | a in [-inf, inf], b in [-inf, inf] | mask | (0, -0): 1; (inf, inf): 1; (nan, 1): 0; (1, nan): 0
// @ equal | a in [-inf, inf], b in [-inf, inf] | mask | (0, -0): 1; (inf, inf): 1; (nan, nan): 0; (1, nan): 0
VF_HD bool less(float a, float b) { return a < b; }
VF_HD bool less(double a, double b) { return a < b; }
VF_HD bool less_equal(float a, float b) { return a <= b; }
VF_HD bool less_equal(double a, double b) { return a <= b; }
VF_HD bool equal(float a, float b) { return a == b; }
VF_HD bool equal(double a, double b) { return a == b; }
// a where the mask m holds, else b.
// @ select | whole m in [0, 1], a in [-inf, inf], b in [-inf, inf] | copy | (1, 2, nan): 2; (0, nan, 2): 2
VF_HD float select(bool m, float a, float b) { return m ? a : b; }
VF_HD double select(bool m, double a, double b) { return m ? a : b; }
// Whether a comparison holds anywhere: what is rare and long is gone round.
// @ any | whole m in [0, 1] | mask | 0: 0; 1: 1
VF_HD bool any(bool m) { return m; }

// x = mantissa 2^exponent with mantissa in [sqrt(1/2), sqrt(2)); of a NaN the mantissa is one
// @ log_parts.mantissa | x in [tiny, max] | 0 ulp | 1: 1
// @ log_parts.exponent | x in [tiny, max] | whole | 1: 0
template <class V>
struct LogParts {
  V mantissa, exponent;
};

// root: the bits of sqrt(1/2)
template <class T, class I>
VF_HD LogParts<T> split_bits(T x, I root, int mantissa) {
  const T nothing = x - x;  // but of a NaN
  I bits;
  memcpy(&bits, &x, sizeof(x));
  const I e = (bits - root) >> mantissa;
  bits -= e << mantissa;
  memcpy(&x, &bits, sizeof(x));
  return {x + nothing, T(e)};
}
VF_HD LogParts<float> log_parts(float x) { return split_bits(x, int32_t(0x3f3504f3), 23); }
VF_HD LogParts<double> log_parts(double x) { return split_bits(x, int64_t(0x3fe6a09e667f3bcd), 52); }

}  // namespace VF_ISA
}  // namespace vaefast

#if defined(CPU_CAPABILITY)
#include "cpu/vec.h"
#endif

namespace vaefast {
inline namespace VF_ISA {

// c + x (next + x (...))
// @ polynomial(1,-0.5,0.25) | x in [-2, 2] | 2 ulp of the terms | 0: 1
template <class V>
VF_HD V polynomial(V, double c) {
  return lit<V>(c);
}
template <class V, class... Rest>
VF_HD V polynomial(V x, double c, Rest... rest) {
  return fma_(polynomial(x, rest...), x, lit<V>(c));
}

template <class V>
constexpr bool kDouble = sizeof(typename Lane<V>::type) == 8;

// log 2 in two parts, the head short enough for an exponent times it to be exact
constexpr double kLog2Head = 0.693145751953125, kLog2Tail = 1.42860682030941723212e-6;  // double
constexpr double kLog2HeadShort = 0.693359375, kLog2TailShort = -2.12194440e-4;         // float

// The polynomials below are minimax, with an error far below an ulp of their use; tools/coefficients.py makes them.

// q of e^y = 1 + y + y^2 q(y) for |y| <= 0.7, to 9e-9 (float) or 3e-17 (double) of it; with SHORT for |y| <= log(2) /
// 2, to 4e-9 of e^y
// @ exp_tail | y in [-0.7, 0.7] | 1 ulp | 0: 0.5
// @ exp_tail<SHORT> | y in [-0.34657, 0.34657] | 3e-7 / 2e-16
template <bool SHORT = false, class V>
VF_HD V exp_tail(V y) {
  if constexpr (kDouble<V>) {
    return polynomial(y, 0.5, 0.16666666666666663, 0.041666666666666706, 0.00833333333333515, 0.0013888888888879474,
                      0.00019841269838231535, 2.4801587309384e-05, 2.7557321380281457e-06, 2.755731665077825e-07,
                      2.505136819786348e-08, 2.0877017309452935e-09, 1.6180604978729174e-10, 1.1496998876979512e-11);
  } else if constexpr (SHORT) {
    return polynomial(y, 0.4999999403953552, 0.1666652113199234, 0.041668329387903214, 0.00836870726197958,
                      0.0013814602280035615);
  } else {
    return polynomial(y, 0.5, 0.16666670143604279, 0.041666653007268906, 0.00833276566118002, 0.0013889351394027472,
                      0.00020075908105354756, 2.4891223802114837e-05);
  }
}

// (atanh(s) / s - 1) / y, y = s^2, for |s| <= 1/3: what it contributes to atanh(s) / s, to 5e-9 or 1e-16
// @ atanh_tail | y in [0, 0.1111] | 2e-6 / 1e-16
template <class V>
VF_HD V atanh_tail(V y) {
  if constexpr (kDouble<V>) {
    return polynomial(y, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21,
                      1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33);
  } else {
    return polynomial(y, 0.3333320617675781, 0.20010830461978912, 0.14000001549720764, 0.14010383188724518);
  }
}

// 2 atanh(s), and the part of it that is not 2 s, for |s| <= 1/3
// @ twice_atanh | s in [-0.3333, 0.3333] | 2 ulp | 0: 0
// @ atanh_excess | s in [-0.3333, 0.3333] | 3 ulp + 4e-9 / 3 ulp | 0: 0
template <class V>
VF_HD V twice_atanh(V s) {
  const V y = s * s;
  return (s + s) * fma_(atanh_tail(y), y, lit<V>(1));
}
template <class V>
VF_HD V atanh_excess(V s) {
  const V y = s * s;
  return (s + s) * (y * atanh_tail(y));
}

// e^(x/2), e^x - 1 and h(x) = e^x - 1 - x. The last two keep their relative accuracy at 0, where a subtraction would
// lose everything: with y = x / 2 and Q = y^2 q(y), e^x = (1 + y + Q)^2, so h(x) = y^2 + Q (2 + 2 y + Q), a sum of
// positive terms. From |y| = 0.7 on, e^x - 1 = (root - 1)(root + 1) is right to 2.7 times root's error and h to 4.9
// times.
// @ exp_terms.root | x in [-inf, inf] | 1 ulp | -inf: 0; inf: inf
// @ exp_terms.em1 | x in [-inf, inf] | 3 ulp | -inf: -1; 0: 0; inf: inf
// @ exp_terms.h | x in [-inf, inf] | 3 ulp | -inf: inf; 0: 0; inf: inf
template <class V>
struct ExpTerms {
  V root, em1, h;
};

// |y| < kNearRoot is near
constexpr double kNearRoot = 0.7;

// Given root = e^(x/2), y = x / 2 and Q at y; y and Q may be anything where x is not near 0. em1 - x is inf at inf too.
template <class V>
VF_HD ExpTerms<V> exp_terms(V x, V root, V y, V Q) {
  const auto near = less(abs_(x), lit<V>(2 * kNearRoot));
  const V h = fma_(Q, fma_(y, lit<V>(2), Q + lit<V>(2)), y * y), m = root - lit<V>(1);
  const V em1 = fma_(m, m, m + m), finite = at_most(x, V(std::numeric_limits<typename Lane<V>::type>::max()));
  return {root, select(near, x + h, em1), select(near, h, em1 - finite)};
}

// @ exp_terms(x,e^(x/2)).em1 | x in [-inf, inf] | 3 ulp | -inf: -1; 0: 0; inf: inf
// @ exp_terms(x,e^(x/2)).h | x in [-inf, inf] | 3 ulp | -inf: inf; 0: 0; inf: inf
template <class V>
VF_HD ExpTerms<V> exp_terms(V x, V root) {
  const V y = x * lit<V>(0.5);
  return exp_terms(x, root, y, y * y * exp_tail(y));
}

}  // namespace VF_ISA
}  // namespace vaefast

#if defined(CPU_CAPABILITY)
#include "cpu/vec_exp.h"
#endif

namespace vaefast {
inline namespace VF_ISA {

template <class V>
VF_HD ExpTerms<V> exp_terms(V x) {
  return exp_terms(x, exp_(x * lit<V>(0.5)));
}

// From one exponential t of -|x|: log(1 + e^x) = (x where x > 0) + tail, its derivative 1 / (1 + e^-x), and one less
// that.
// @ softplus_terms.step | x in [-inf, inf] | mask | 0: 0; -inf: 0; inf: 1
// @ softplus_terms.tail | x in [-inf, inf] | 4 ulp | -inf: 0; inf: 0
// @ softplus_terms.sigmoid | x in [-inf, inf] | 3 ulp | -inf: 0; 0: 0.5; inf: 1
// @ softplus_terms.complement | x in [-inf, inf] | 3 ulp | -inf: 1; 0: 0.5; inf: 0
template <class V>
struct SoftplusTerms {
  V step, tail, sigmoid, complement;  // step is 1 where x > 0, else 0
};

template <class V>
VF_HD SoftplusTerms<V> softplus_terms(V x) {
  const V zero = lit<V>(0), one = lit<V>(1);
  const V t = exp_(zero - abs_(x));
  // 1 / (1 + t) and 1 / (2 + t) from one division: it costs as much as the rest on a CPU
  const V a = one + t, b = a + one, inverse = reciprocal(a * b);
  const V r = inverse * b;
  const auto positive = less(zero, x);
  // log(1 + t) = 2 atanh(t / (2 + t))
  const V tail = twice_atanh(t * (inverse * a)), rest = t * r;
  return {select(positive, one, zero), tail, select(positive, r, rest), select(positive, rest, r)};
}

// log(1 + e^x), given its terms at x.
// @ softplus(x,terms) | x in [-inf, inf] | 4 ulp | -inf: 0; inf: inf
template <class V>
VF_HD V softplus(V x, const SoftplusTerms<V>& s) {
  return select(less(lit<V>(0), x), x, lit<V>(0)) + s.tail;
}

// tanh x and its derivative
// @ tanh_terms.tanh | x in [-inf, inf] | 3 ulp | -inf: -1; 0: 0; inf: 1
// @ tanh_terms.slope | x in [-inf, inf] | 5 ulp | -inf: 0; 0: 1; inf: 0
template <class V>
struct TanhTerms {
  V tanh, slope;
};

// With m = e^(-2 |x|) - 1: tanh |x| = -m / (2 + m), its derivative (2 e^-|x| / (2 + m))^2.
template <class V>
VF_HD TanhTerms<V> tanh_terms(V x) {
  const V zero = lit<V>(0), two = lit<V>(2);
  const auto e = exp_terms(lit<V>(-2) * abs_(x));
  const V inverse = lit<V>(1) / (two + e.em1), t = (zero - e.em1) * inverse, root = two * e.root * inverse;
  return {select(less(x, zero), zero - t, t), root * root};
}

// log x, and l - log x to some 1e-9 where they are near: log x comes in two parts, so that their difference keeps what
// its parts would have rounded away.
// @ log_difference.log | whole l in [-90, 90], x in [tiny, max] | 1 ulp | (nan, 1): 0
// @ log_difference.difference | l in [-90, 90], x in [tiny, max] | 2 ulp + 1e-8 / 2 ulp + 1e-16 | (inf, 1): inf
template <class V>
struct LogDifference {
  V log, difference;
};

template <class V>
VF_HD LogDifference<V> log_difference(V l, V x) {
  constexpr double head = kDouble<V> ? kLog2Head : kLog2HeadShort, tail = kDouble<V> ? kLog2Tail : kLog2TailShort;
  const auto p = log_parts(x);
  const V one = lit<V>(1), up = p.mantissa + one, down = p.mantissa - one, inverse = one / up;
  // s = down / up and what its rounding, and that of up, left over
  const V s = down * inverse, lost = p.mantissa - (up - one);
  const V rest = (fused_(lit<V>(0) - s, up, down) - s * lost) * inverse;
  const V big = s + s, small = fma_(p.exponent, lit<V>(tail), fma_(lit<V>(2), rest, atanh_excess(s)));
  const V whole = p.exponent * lit<V>(head);
  return {whole + (big + small), ((l - whole) - big) - small};
}

// The same for any x: 0, subnormal numbers and infinity among them.
// @ full_log_difference.log | whole l in [-90, 90], x in [0, inf] | 3 ulp | (1, 0): -inf; (1, inf): inf; (1, -1): nan
// @ full_log_difference.difference | l in [-90, 90], x in [0, inf] | 3 ulp + 1e-8 / 3 ulp + 1e-16 | (1, 0): inf
template <class V>
VF_HD LogDifference<V> full_log_difference(V l, V x) {
  using T = typename Lane<V>::type;
  const V tiny = V(std::numeric_limits<T>::min()), inf = infinity<V>();
  LogDifference<V> d = log_difference(l, x);
  if (any(less(x, tiny)) || any(equal(x, inf))) {
    const auto ordinary = less_equal(tiny, x - (x - x));
    const V log = log_(x);
    d = {select(ordinary, d.log, log), select(ordinary, d.difference, l - log)};
  }
  return d;
}

}  // namespace VF_ISA
}  // namespace vaefast
