// Philox4x32-10 (Salmon et al. 2011) and Box-Muller. Element i of a sample reads word i % 4 of counter offset + i / 4,
// so the noise is a function of (seed, offset, i) alone.
#pragma once

#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

template <int K>
inline constexpr double kInverseFactorial = kInverseFactorial<K - 1> / K;
template <>
inline constexpr double kInverseFactorial<0> = 1.0;

struct Words {
  uint32_t w[4];
};

VF_HD uint64_t product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // said in C++ it costs an addition of zero more
  uint64_t p;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return uint64_t(a) * b;
#endif
}

VF_HD void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t p = product(a, b);
  high = uint32_t(p >> 32);
  low = uint32_t(p);
}

// W holds words: a uint32_t, or a vector of them (cpu/noise.h).
template <class W>
VF_HD void philox_rounds(W (&c)[4], W k0, W k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    W high0, low0, high1, low1;
    multiply(c[0], W(0xD2511F53u), high0, low0);
    multiply(c[2], W(0xCD9E8D57u), high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 = k0 + W(0x9E3779B9u);
    k1 = k1 + W(0xBB67AE85u);
  }
}

VF_HD Words philox4x32(uint64_t counter, uint32_t stream, uint64_t key) {
  Words x{{uint32_t(counter), uint32_t(counter >> 32), stream, 0}};
  philox_rounds(x.w, uint32_t(key), uint32_t(key >> 32));
  return x;
}

// 32 bits to (0, 1] and to [-1/2, 1/2) of a turn; float rounds them, but keeps all bits of small ones: tails to 6.6
// sigma.
VF_HD float uniform(uint32_t x) { return fma_(float(x), 0x1p-32f, 0x1p-32f); }
VF_HD float turns(uint32_t x) { return float(int32_t(x)) * 0x1p-32f; }

// The same with 53 bits of two words, high word first.
VF_HD double uniform(uint32_t hi, uint32_t lo) { return double(((uint64_t(hi) << 21) | (lo >> 11)) + 1) * 0x1p-53; }
VF_HD double turns(uint32_t hi, uint32_t lo) { return double(int64_t((uint64_t(hi) << 32) | lo) >> 11) * 0x1p-53; }

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

// sin(2 pi t) and cos(2 pi t) for |t| <= 1/2
#if defined(__CUDA_ARCH__)
VF_HD void sincos_turns(double t, double& s, double& c) { ::sincospi(2 * t, &s, &c); }
#else
template <class V>
VF_HD void sincos_turns(V t, V& s, V& c) {
  // t = q / 4 + f, |f| <= 1/8: minimax in f by tools/coefficients.py, relative error 3e-8 and 7e-8 (float), or Taylor
  // in 2 pi f to a^17 and a^18
  const V q = rint_(t * lit<V>(4)), f = fma_(q, lit<V>(-0.25), t);
  V sf, cf;
  if constexpr (kDouble<V>) {
    const V a = f * lit<V>(6.283185307179586476925), y = lit<V>(0) - a * a;
    sf = a * even_tail<1, 17>(y);
    cf = even_tail<0, 18>(y);
  } else {
    const V y = f * f;
    sf = f * polynomial(y, 6.2831854820251465, -41.34168243408203, 81.59235382080078, -75.39356231689453);
    cf = polynomial(y, 1.0, -19.73914909362793, 64.92030334472656, -83.5525894165039);
  }
  const V a = abs_(q);
  const auto odd = equal(a, lit<V>(1)), flip = equal(a, lit<V>(2));
  const V sq = select(odd, cf * q, sf), cq = select(odd, (lit<V>(0) - sf) * q, cf);
  s = select(flip, lit<V>(0) - sq, sq);
  c = select(flip, lit<V>(0) - cq, cq);
}
#endif

#if defined(__CUDA_ARCH__)
// From the special-function unit, in a third of the instructions; for noise alone. By PTX's bounds on lg2, sqrt, sin
// and cos the result is within 1e-6 (1 + radius) of the exact one, and the radius is at most 6.7.
VF_HD void box_muller(float u, float t, float& first, float& second) {
  float l, radius, s, c;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(u));
  // near 1 the absolute error of lg2 would show in the radius: -2 log(1 - v) by its series
  const float v = 1 - u;
  const float near = v * fma_(v, fma_(v, fma_(v, 0.5f, 2.0f / 3), 1.0f), 2.0f);
  const float square = v < 0x1p-6f ? near : l * -1.38629436111989f;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(square));
  const float angle = t * 6.28318530717959f;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(angle));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(c) : "f"(angle));
  first = radius * c;
  second = radius * s;
}
#endif

template <class V>
VF_HD void box_muller(V u, V t, V& first, V& second) {
  V s, c;
  sincos_turns(t, s, c);
  const V radius = sqrt_(lit<V>(-2) * log_unit(u));
  first = radius * c;
  second = radius * s;
}

}  // namespace VF_ISA
}  // namespace vaefast
