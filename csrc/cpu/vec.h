// What the loops compute with: Wide<T>, on which vmath.h's primitives work. It is made of at::vec::Vectorized or, where
// one lane has to do, T itself.
#pragma once

#if defined(VF_ONE_LANE)

namespace vaefast {
inline namespace VF_ISA {

template <class T>
using Vec = T;
template <class T>
using Wide = T;

template <class T>
constexpr int kLanes = 1;

}  // namespace VF_ISA
}  // namespace vaefast

#else

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
VF_HD Vec<T> at_most(Vec<T> x, Vec<T> most) {
  return at::vec::clamp_max(x, most);
}
template <class T>
VF_HD Vec<T> reciprocal(Vec<T> x) {
  return Vec<T>(T(1)) / x;
}
#if defined(CPU_CAPABILITY_AVX512)
// 14 bits, doubled by a step of Newton's: a third of a division's time
VF_HD Vec<float> reciprocal(Vec<float> x) {
  const Vec<float> r = _mm512_rcp14_ps(x);
  return at::vec::fmadd(at::vec::fnmadd(x, r, Vec<float>(1.0f)), r, r);
}
#endif
template <class T>
VF_HD Vec<T> rint_(Vec<T> x) {
  return x.round();
}
// Between two constants.
// @ clamp_ | x in [-inf, inf], whole lo in [-9, -1], whole hi in [1, 9] | 0 ulp | (inf, -1, 1): 1; (nan, -1, 1): nan
template <class T>
VF_HD Vec<T> clamp_(Vec<T> x, Vec<T> lo, Vec<T> hi) {
  return at::vec::clamp(x, lo, hi);
}
template <class T>
VF_HD Vec<T> fma_(Vec<T> a, Vec<T> b, Vec<T> c) {
  return at::vec::fmadd(a, b, c);
}
template <class T>
VF_HD Vec<T> fused_(Vec<T> a, Vec<T> b, Vec<T> c) {
  return fma_(a, b, c);
}

// Whether a comparison holds everywhere.
// @ all | whole m in [0, 1] | mask | 0: 0; 1: 1
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
VF_HD bool any(__mmask16 mask) { return mask != 0; }
VF_HD bool any(__mmask8 mask) { return mask != 0; }
VF_HD bool all(__mmask16 mask) { return mask == 0xffff; }
VF_HD bool all(__mmask8 mask) { return mask == 0xff; }
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
template <class T>
VF_HD bool any(Vec<T> mask) {
  return mask.zero_mask() != (1 << Vec<T>::size()) - 1;
}
template <class T>
VF_HD bool all(Vec<T> mask) {
  return mask.zero_mask() == 0;
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

// 2^n: adding 1.5 * 2^mantissa leaves n in the low bits.
// @ power_of_two | whole n in [-126, 127] | 0 ulp | 0: 1
template <class T>
VF_HD Vec<T> power_of_two(Vec<T> n) {
  constexpr T magic = T(int64_t(3) << (kMantissa<T> - 1)) + T(kBias<T>);
  return from_bits<T>(bits_of(n + Vec<T>(magic)) << Vec<IntOf<T>>(kMantissa<T>));
}

// m 2^n; in two steps, so that overflow and gradual underflow come out by themselves
// @ ldexp_ | m in [0.5, 2], whole n in [-251, 251] | 1 ulp | (1, 0): 1
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

#if defined(CPU_CAPABILITY_AVX512)
// Two vectors, each operation done to one and the other by turns: a functor is one long chain of dependent operations,
// and what waits for its operands fills the schedulers before another iteration comes within reach.
template <class T>
struct Wide {
  Vec<T> a, b;

  Wide() = default;
  VF_HD Wide(Vec<T> a, Vec<T> b) : a(a), b(b) {}
  VF_HD explicit Wide(T x) : a(x), b(x) {}

  static constexpr int size() { return 2 * Vec<T>::size(); }
  static VF_HD Wide loadu(const T* p) { return {Vec<T>::loadu(p), Vec<T>::loadu(p + Vec<T>::size())}; }
  VF_HD void store(T* p) const {
    a.store(p);
    b.store(p + Vec<T>::size());
  }
};

template <class T>
struct Lane<Wide<T>> {
  using type = T;
};

template <class M>
struct WideMask {
  M a, b;
};
template <class M>
WideMask(M, M) -> WideMask<M>;

#define VF_EACH_1(name)            \
  template <class T>               \
  VF_HD Wide<T> name(Wide<T> x) {  \
    return {name(x.a), name(x.b)}; \
  }
#define VF_EACH_2(name)                              \
  template <class T>                                 \
  VF_HD auto name(Wide<T> x, Wide<T> y) {            \
    return WideMask{name(x.a, y.a), name(x.b, y.b)}; \
  }
#define VF_EACH_3(name)                                 \
  template <class T>                                    \
  VF_HD Wide<T> name(Wide<T> x, Wide<T> y, Wide<T> z) { \
    return {name(x.a, y.a, z.a), name(x.b, y.b, z.b)};  \
  }
#define VF_EACH_OPERATOR(op)                        \
  template <class T>                                \
  VF_HD Wide<T> operator op(Wide<T> x, Wide<T> y) { \
    return {x.a op y.a, x.b op y.b};                \
  }

VF_EACH_OPERATOR(+)
VF_EACH_OPERATOR(-)
VF_EACH_OPERATOR(*)
VF_EACH_OPERATOR(/)
VF_EACH_1(sqrt_)
VF_EACH_1(abs_)
VF_EACH_1(reciprocal)
VF_EACH_1(rint_)
VF_EACH_2(less)
VF_EACH_2(less_equal)
VF_EACH_2(equal)
VF_EACH_3(clamp_)
template <class T>
VF_HD Wide<T> at_most(Wide<T> x, Wide<T> most) {
  return {at_most(x.a, most.a), at_most(x.b, most.b)};
}
VF_EACH_3(fma_)
VF_EACH_3(fused_)

template <class T>
VF_HD Wide<T> ldexp_(Wide<T> m, Wide<T> n) {
  return {ldexp_(m.a, n.a), ldexp_(m.b, n.b)};
}
template <class M, class T>
VF_HD Wide<T> select(WideMask<M> mask, Wide<T> x, Wide<T> y) {
  return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}
template <class M>
VF_HD bool any(WideMask<M> mask) {
  return any(mask.a) || any(mask.b);
}
#else
template <class T>
using Wide = Vec<T>;
#endif

template <class T>
constexpr int kLanes = Wide<T>::size();

}  // namespace VF_ISA
}  // namespace vaefast

#endif  // VF_ONE_LANE
