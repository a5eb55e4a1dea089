// vmath.h's primitives for at::vec::Vectorized.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace vaefast {
inline namespace VF_ISA {

template <class T>
using Vec = at::vec::Vectorized<T>;

template <class T>
struct Lane<Vec<T>> {
  using type = T;
};

template <class T>
VF_HD Vec<T> sqrt_(Vec<T> x) {
  return x.sqrt();
}
template <class T>
VF_HD Vec<T> abs_(Vec<T> x) {
  return x.abs();
}
template <class T>
VF_HD Vec<T> reciprocal(Vec<T> x) {
  return Vec<T>(T(1)) / x;
}
template <class T>
VF_HD Vec<T> rint_(Vec<T> x) {
  return x.round();
}
template <class T>
VF_HD Vec<T> fma_(Vec<T> a, Vec<T> b, Vec<T> c) {
  return at::vec::fmadd(a, b, c);
}

#if defined(CPU_CAPABILITY_AVX512)
// at::vec keeps masks in vectors and turns them back at every use.
VF_HD __mmask16 less(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
VF_HD __mmask8 less(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
VF_HD __mmask16 less_equal(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
VF_HD __mmask8 less_equal(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
VF_HD __mmask16 equal(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
VF_HD __mmask8 equal(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
VF_HD Vec<float> select(__mmask16 mask, Vec<float> a, Vec<float> b) { return _mm512_mask_blend_ps(mask, b, a); }
VF_HD Vec<double> select(__mmask8 mask, Vec<double> a, Vec<double> b) { return _mm512_mask_blend_pd(mask, b, a); }
#else
template <class T>
VF_HD Vec<T> less(Vec<T> a, Vec<T> b) {
  return a < b;
}
template <class T>
VF_HD Vec<T> less_equal(Vec<T> a, Vec<T> b) {
  return a <= b;
}
template <class T>
VF_HD Vec<T> equal(Vec<T> a, Vec<T> b) {
  return a == b;
}
template <class T>
VF_HD Vec<T> select(Vec<T> mask, Vec<T> a, Vec<T> b) {
  return Vec<T>::blendv(b, a, mask);
}
#endif

// The integers of T's size.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
VF_HD Vec<IntOf<T>> bits_of(Vec<T> x) {
  return at::vec::cast<IntOf<T>>(x);
}
template <class T>
VF_HD Vec<T> from_bits(Vec<IntOf<T>> x) {
  return at::vec::cast<T>(x);
}

template <class T>
constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
template <class T>
constexpr int kBias = sizeof(T) == 4 ? 127 : 1023;

// 2^n for whole n within the exponents of normal numbers: adding 1.5 * 2^mantissa leaves n in the low bits.
template <class T>
VF_HD Vec<T> power_of_two(Vec<T> n) {
  constexpr T magic = T(int64_t(3) << (kMantissa<T> - 1)) + T(kBias<T>);
  return from_bits<T>(bits_of(n + Vec<T>(magic)) << Vec<IntOf<T>>(kMantissa<T>));
}

// m 2^n for whole n; in two steps, so that overflow and gradual underflow come out by themselves
#if defined(CPU_CAPABILITY_AVX512)
VF_HD Vec<float> ldexp_(Vec<float> m, Vec<float> n) { return _mm512_scalef_ps(m, n); }
VF_HD Vec<double> ldexp_(Vec<double> m, Vec<double> n) { return _mm512_scalef_pd(m, n); }
#else
template <class T>
VF_HD Vec<T> ldexp_(Vec<T> m, Vec<T> n) {
  const Vec<T> half = (n * Vec<T>(T(0.5))).round();
  return m * power_of_two(half) * power_of_two(n - half);
}
#endif

}  // namespace VF_ISA
}  // namespace vaefast
