// Standard normal noise for a tile, a vector of Philox counters at a time.
#pragma once

#include "cpu/tile.h"
#include "philox.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Philox words in the low halves of 64-bit lanes, a counter a lane: the one multiplication that vectors have reads low
// halves alone, so whatever a word leaves above itself need not be cleared.
struct WordVec {
  using V = Vec<int64_t>;
  static constexpr int size = V::size();
  V lanes;

  explicit WordVec(V v) : lanes(v) {}
  WordVec() = default;
  explicit WordVec(uint32_t word) : lanes(int64_t(word)) {}
};

VF_HD WordVec operator^(WordVec a, WordVec b) { return WordVec(a.lanes ^ b.lanes); }
VF_HD WordVec operator+(WordVec a, WordVec b) { return WordVec(a.lanes + b.lanes); }

#if defined(CPU_CAPABILITY_AVX512)
VF_HD WordVec high_half(WordVec a) { return WordVec(_mm512_srli_epi64(a.lanes, 32)); }
VF_HD WordVec product(WordVec a, WordVec b) { return WordVec(_mm512_mul_epu32(a.lanes, b.lanes)); }
// the words of a and b by turns
VF_HD Vec<int32_t> zip(WordVec a, WordVec b) {
  return _mm512_mask_blend_epi32(0xAAAA, a.lanes, _mm512_slli_epi64(b.lanes, 32));
}
VF_HD Vec<float> from_unsigned(Vec<int32_t> x) { return _mm512_cvtepu32_ps(x); }
#else
VF_HD WordVec high_half(WordVec a) { return WordVec(_mm256_srli_epi64(a.lanes, 32)); }
VF_HD WordVec product(WordVec a, WordVec b) { return WordVec(_mm256_mul_epu32(a.lanes, b.lanes)); }
VF_HD Vec<int32_t> zip(WordVec a, WordVec b) {
  return _mm256_blend_epi32(a.lanes, _mm256_slli_epi64(b.lanes, 32), 0xAA);
}
// rounded once, as the conversion of an unsigned number is: both halves are exact
VF_HD Vec<float> from_unsigned(Vec<int32_t> x) {
  const auto high = at::vec::convert_to_fp_of_same_size<float>(Vec<int32_t>(_mm256_srli_epi32(x, 16)));
  const auto low = at::vec::convert_to_fp_of_same_size<float>(x & Vec<int32_t>(0xffff));
  return fma_(high, Vec<float>(65536.0f), low);
}
#endif

VF_HD void multiply(WordVec a, WordVec b, WordVec& high, WordVec& low) {
  low = product(a, b);
  high = high_half(low);
}

constexpr int kCounters = WordVec::size;

// out[4 l + j] is normal j of counter + l
VF_HD void normal_group(uint64_t counter, uint64_t key, float* out) {
  using V = Vec<float>;
  const WordVec counters(WordVec::V::arange(int64_t(counter), int64_t(1)));
  WordVec w[4] = {counters, high_half(counters), WordVec(0u), WordVec(0u)};
  philox_rounds(w, WordVec(uint32_t(key)), WordVec(uint32_t(key >> 32)));
  const V scale(0x1p-32f);
  const V u = fma_(from_unsigned(zip(w[0], w[2])), scale, scale);
  const V t = at::vec::convert_to_fp_of_same_size<float>(zip(w[1], w[3])) * scale;
  V first, second;
  box_muller(u, t, first, second);
  const auto [head, tail] = at::vec::interleave2(first, second);
  head.store(out);
  tail.store(out + V::size());
}
#else
constexpr int kCounters = 16;
#endif

constexpr int kGroup = 4 * kCounters;  // normals from one pass over a vector of counters

// The same in loops that the compiler makes vectors of: for double, and where there is no wider multiplier to write
// for.
template <class T>
VF_HD void normal_group(uint64_t counter, uint64_t key, T* out) {
  using V = Vec<T>;
  constexpr int lanes = sizeof(V) / sizeof(T);
  alignas(64) T u[2][kCounters], t[2][kCounters], normal[4][kCounters];
  for (int k = 0; k < 2; ++k) {
    for (int l = 0; l < kCounters; ++l) {
      const Words x = philox4x32(counter + l, kDouble<V> ? k : 0, key);
      if constexpr (kDouble<V>) {
        u[k][l] = uniform(x.w[0], x.w[1]);
        t[k][l] = turns(x.w[2], x.w[3]);
      } else {
        u[k][l] = uniform(x.w[2 * k]);
        t[k][l] = turns(x.w[2 * k + 1]);
      }
    }
    for (int l = 0; l < kCounters; l += lanes) {
      V a, b;
      box_muller(load_lanes<V>(u[k] + l), load_lanes<V>(t[k] + l), a, b);
      store_lanes(a, normal[2 * k] + l);
      store_lanes(b, normal[2 * k + 1] + l);
    }
  }
  for (int l = 0; l < kCounters; ++l) {
    for (int j = 0; j < 4; ++j) out[4 * l + j] = normal[j][l];
  }
}

// out[i] is the normal of element first + i
template <class T>
void normal_range(uint64_t counter, uint64_t key, int64_t first, int n, T* out) {
  alignas(64) T group[kGroup];
  for (int done = 0; done < n;) {
    const int64_t element = first + done;
    const int skip = int(element & 3);
    const uint64_t c = counter + uint64_t(element >> 2);
    if (skip == 0 && n - done >= kGroup) {
      normal_group(c, key, out + done);
      done += kGroup;
      continue;
    }
    normal_group(c, key, group);
    const int take = kGroup - skip < n - done ? kGroup - skip : n - done;
    std::memcpy(out + done, group + skip, take * sizeof(T));
    done += take;
  }
}

template <class T>
const T* read_noise(const Philox& philox, const Tile& t, Buffer<T>& buffer) {
  const uint64_t key = uint64_t(*philox.seed), counter = uint64_t(*philox.offset) + philox.offset_add;
  if (philox.linear) {
    normal_range(counter, key, t.start, t.n, buffer.data);
    return buffer.data;
  }
  const int64_t inner = philox.stride[t.space.ndim - 1];
  for_runs(t, philox.stride, [&](int at, int count, int64_t offset) {
    if (inner == 1) {
      normal_range(counter, key, offset, count, buffer.data + at);
    } else {
      for (int i = 0; i < count; ++i) normal_range(counter, key, offset + i * inner, 1, buffer.data + at + i);
    }
  });
  return buffer.data;
}

}  // namespace
}  // namespace VF_ISA
}  // namespace vaefast
