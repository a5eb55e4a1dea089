// Arithmetic written once, generic in V: float or double (host and CUDA), at::vec::Vectorized of either (SIMD units).
//
// The primitives come first (a SIMD unit includes cpu/vec.h, which overloads them, before this file); what is built on
// them follows.
// (Not named math.h: this folder is on the include path, where it would stand in for the system's.)
#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

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
VF_HD float fma_(float a, float b, float c) { return ::fmaf(a, b, c); }
VF_HD double fma_(double a, double b, double c) { return ::fma(a, b, c); }
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
VF_HD float rint_(float x) { return ::rintf(x); }
VF_HD double rint_(double x) { return ::rint(x); }
VF_HD float select(bool m, float a, float b) { return m ? a : b; }
VF_HD double select(bool m, double a, double b) { return m ? a : b; }

}  // namespace VF_ISA
}  // namespace vaefast

#if defined(CPU_CAPABILITY)
#include "cpu/vec.h"
#endif

namespace vaefast {
inline namespace VF_ISA {

template <int K>
inline constexpr double kInverseFactorial = kInverseFactorial<K - 1> / K;
template <>
inline constexpr double kInverseFactorial<0> = 1.0;

// sum over j = K .. LAST of x^(j - K) / j!
template <int K, int LAST, class V>
VF_HD V exp_tail(V x) {
  constexpr double c = kInverseFactorial<K>;
  if constexpr (K == LAST) {
    return lit<V>(c);
  } else {
    return fma_(exp_tail<K + 1, LAST>(x), x, lit<V>(c));
  }
}

// sum over k = K .. LAST of y^(k - K) / (2 k + 1)
template <int K, int LAST, class V>
VF_HD V atanh_tail(V y) {
  constexpr double c = 1.0 / (2 * K + 1);
  if constexpr (K == LAST) {
    return lit<V>(c);
  } else {
    return fma_(atanh_tail<K + 1, LAST>(y), y, lit<V>(c));
  }
}

// sum over j = K, K + 2 .. LAST of y^((j - K) / 2) / j!: cosine and sine, with y = -x^2
template <int K, int LAST, class V>
VF_HD V even_tail(V y) {
  constexpr double c = kInverseFactorial<K>;
  if constexpr (K == LAST) {
    return lit<V>(c);
  } else {
    return fma_(even_tail<K + 2, LAST>(y), y, lit<V>(c));
  }
}

}  // namespace VF_ISA
}  // namespace vaefast

#if defined(CPU_CAPABILITY)
#include "cpu/vec_exp.h"
#endif

namespace vaefast {
inline namespace VF_ISA {

template <class V>
constexpr bool kDouble = sizeof(typename Lane<V>::type) == 8;

// e^x - 1 and h(x) = e^x - 1 - x, given ex = e^x. Both keep their relative accuracy at 0, where the subtraction loses
// everything: the series is exact to half an ulp for |x| < 2 (float, to x^14/14!) or 1 (double, to x^18/18!). Beyond,
// e^x comes as a square with 2 to 5 ulp of error, of which the subtraction makes at most 1.7 (3.8) times as many.
template <class V>
struct ExpTerms {
  V em1, h;
};

template <class V>
VF_HD ExpTerms<V> exp_terms(V x, V ex) {
  const V one = lit<V>(1);
  const V series = x * x * exp_tail<2, kDouble<V> ? 18 : 14>(x);
  const auto near = abs_(x) < lit<V>(kDouble<V> ? 1 : 2);
  const V em1 = ex - one;
  return {select(near, x + series, em1), select(near, series, em1 - x)};
}

// log(1 + t) for t in [0, 1], given inverse = 1 / (2 + t): 2 atanh(s) with s = t / (2 + t) <= 1/3
template <class V>
VF_HD V log1p_unit(V t, V inverse) {
  const V s = t * inverse;
  const V y = s * s;
  return (s + s) * fma_(atanh_tail<1, kDouble<V> ? 16 : 7>(y), y, lit<V>(1));
}

// From one exponential t of -|x|: log(1 + e^x) = (x where x > 0) + tail, and its derivative 1 / (1 + e^-x).
template <class V>
struct SoftplusTerms {
  V step, tail, sigmoid;  // step is 1 where x > 0, else 0
};

template <class V>
VF_HD SoftplusTerms<V> softplus_terms(V x) {
  const V zero = lit<V>(0), one = lit<V>(1);
  const V t = exp_(zero - abs_(x));
  // 1 / (1 + t) and 1 / (2 + t) from one division: it costs as much as the rest on a CPU
  const V a = one + t, b = a + one, inverse = reciprocal(a * b);
  const V r = inverse * b;
  const auto positive = x > zero;
  return {select(positive, one, zero), log1p_unit(t, inverse * a), select(positive, r, t * r)};
}

}  // namespace VF_ISA
}  // namespace vaefast
