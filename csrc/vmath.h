// Arithmetic written once, generic in V: float or double (host and CUDA), at::vec::Vectorized of either (SIMD units).
//
// The primitives come first (a SIMD unit includes cpu/vec.h, which overloads them, before this file); what is built on
// them follows.
// (Not named math.h: this folder is on the include path, where it would stand in for the system's.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

VF_HD float exp_(float x) { return ::expf(x); }
VF_HD double exp_(double x) { return ::exp(x); }
// log of x in [2^-53, 1]
VF_HD float log_unit(float x) { return ::logf(x); }
VF_HD double log_unit(double x) { return ::log(x); }
VF_HD float log_(float x) { return ::logf(x); }
VF_HD double log_(double x) { return ::log(x); }
VF_HD float sqrt_(float x) { return ::sqrtf(x); }
VF_HD double sqrt_(double x) { return ::sqrt(x); }
VF_HD float abs_(float x) { return ::fabsf(x); }
VF_HD double abs_(double x) { return ::fabs(x); }
// a b + c: rounded once where that is one instruction, a call of many elsewhere. fused_ is for where it has to be.
VF_HD float fused_(float a, float b, float c) { return ::fmaf(a, b, c); }
VF_HD double fused_(double a, double b, double c) { return ::fma(a, b, c); }
#if defined(VF_ONE_LANE)
VF_HD float fma_(float a, float b, float c) { return a * b + c; }
VF_HD double fma_(double a, double b, double c) { return a * b + c; }
#else
VF_HD float fma_(float a, float b, float c) { return fused_(a, b, c); }
VF_HD double fma_(double a, double b, double c) { return fused_(a, b, c); }
#endif
// 1 / x, within an ulp, of x in [2^-100, 2^100]
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
// of |x| < 2^22
#if defined(VF_ONE_LANE)
// what adding 1.5 * 2^mantissa rounds away; ::rint is a call
VF_HD float rint_(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
VF_HD double rint_(double x) { return (x + 0x1.8p52) - 0x1.8p52; }
#else
VF_HD float rint_(float x) { return ::rintf(x); }
VF_HD double rint_(double x) { return ::rint(x); }
#endif
// Comparisons for select(): on a vector they give what its instruction set keeps masks in.
VF_HD bool less(float a, float b) { return a < b; }
VF_HD bool less(double a, double b) { return a < b; }
VF_HD bool less_equal(float a, float b) { return a <= b; }
VF_HD bool less_equal(double a, double b) { return a <= b; }
VF_HD bool equal(float a, float b) { return a == b; }
VF_HD bool equal(double a, double b) { return a == b; }
VF_HD float select(bool m, float a, float b) { return m ? a : b; }
VF_HD double select(bool m, double a, double b) { return m ? a : b; }
// Whether a comparison holds anywhere: what is rare and long is gone round.
VF_HD bool any(bool m) { return m; }

// x = mantissa 2^exponent with mantissa in [sqrt(1/2), sqrt(2)), of a normal number x > 0
template <class V>
struct LogParts {
  V mantissa, exponent;
};

// root: the bits of sqrt(1/2)
template <class T, class I>
VF_HD LogParts<T> split_bits(T x, I root, int mantissa) {
  I bits;
  memcpy(&bits, &x, sizeof(x));
  const I e = (bits - root) >> mantissa;
  bits -= e << mantissa;
  memcpy(&x, &bits, sizeof(x));
  return {x, T(e)};
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

// The polynomials below are minimax in relative error, with a bound that is far below an ulp of their use.

// q of e^y = 1 + y + y^2 q(y) for |y| <= 0.7, to 7e-9 (float) or 3e-17 (double); with SHORT for |y| <= log(2) / 2,
// where 1.3e-7 of it is 1e-8 of e^y
template <bool SHORT = false, class V>
VF_HD V exp_tail(V y) {
  if constexpr (kDouble<V>) {
    return polynomial(y, 0.5, 0.16666666666666652, 0.04166666666666617, 0.008333333333338395, 0.0013888888888983993,
                      0.0001984126983514556, 2.480158723005487e-05, 2.7557322634329545e-06, 2.755734480957252e-07,
                      2.5051138112305132e-08, 2.087229350187011e-09, 1.6196310713394176e-10, 1.1799674778334012e-11);
  } else if constexpr (SHORT) {
    return polynomial(y, 0.4999999954544021, 0.16666576361511343, 0.04166685548701433, 0.008363300018276778,
                      0.0013901340075123823);
  } else {
    return polynomial(y, 0.5, 0.1666667017727267, 0.041666648911626185, 0.008332755358197726, 0.0013889472122689261,
                      0.00020078047531481866, 2.4879970707576098e-05);
  }
}

// (atanh(s) / s - 1) / y, y = s^2, for |s| <= 1/3: what it contributes to atanh(s) / s, to 5e-9 or 1e-16
template <class V>
VF_HD V atanh_tail(V y) {
  if constexpr (kDouble<V>) {
    return polynomial(y, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21,
                      1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33);
  } else {
    return polynomial(y, 0.33333206564805007, 0.2001084959436604, 0.13999569703293566, 0.14012232824622367);
  }
}

// 2 atanh(s), and the part of it that is not 2 s, for |s| <= 1/3
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
template <class V>
struct ExpTerms {
  V root, em1, h;
};

// |y| < kNearRoot is near
constexpr double kNearRoot = 0.7;

// Given root = e^(x/2), y = x / 2 and Q at y; y and Q may be anything where x is not near 0.
template <class V>
VF_HD ExpTerms<V> exp_terms(V x, V root, V y, V Q) {
  const auto near = less(abs_(x), lit<V>(2 * kNearRoot));
  const V h = fma_(Q, fma_(y, lit<V>(2), Q + lit<V>(2)), y * y), m = root - lit<V>(1);
  const V em1 = fma_(m, m, m + m);
  return {root, select(near, x + h, em1), select(near, h, em1 - x)};
}

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

// tanh x and its derivative
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
// its parts would have rounded away. x > 0.
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

}  // namespace VF_ISA
}  // namespace vaefast
