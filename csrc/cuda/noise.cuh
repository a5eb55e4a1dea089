// Standard normal noise for a pack: the same (seed, counter, element) function as cpu/noise.h. No torch types here.
#pragma once

#include "cuda/pack.cuh"

namespace vaefast {

struct Stream {
  uint64_t key, counter;
};

// The seed and first counter of a launch; one thread keeps them for backward. `skipped` counters are others'.
__device__ inline Stream open_stream(const Philox& p, bool first_thread, uint64_t skipped) {
  const uint64_t key = p.seed ? uint64_t(*p.seed) : p.seed_value;
  const uint64_t offset = (p.offset ? uint64_t(*p.offset) : p.offset_value) + p.offset_add;
  const Stream s{key, offset >> p.offset_shift};
  if (p.save && first_thread) {
    p.save[0] = int64_t(s.key);
    p.save[1] = int64_t(s.counter);
  }
  return {s.key, s.counter + skipped};
}

// Normals that are drawn together.
template <class T>
constexpr int kDrawn = 16 / sizeof(T);

// The normals of elements start .. start + kDrawn - 1, with start a multiple of kDrawn.
__device__ inline void normals(const Stream& s, int64_t start, float (&out)[4]) {
  const Words x = philox4x32(s.counter + uint64_t(start / 4), 0, s.key);
  box_muller(uniform(x.w[0]), turns(x.w[1]), out[0], out[1]);
  box_muller(uniform(x.w[2]), turns(x.w[3]), out[2], out[3]);
}

__device__ inline void normals(const Stream& s, int64_t start, double (&out)[2]) {
  const Words x = philox4x32(s.counter + uint64_t(start / 4), uint32_t(start / 2 % 2), s.key);
  box_muller(uniform(x.w[0], x.w[1]), turns(x.w[2], x.w[3]), out[0], out[1]);
}

template <class T, int N>
__device__ inline void read_noise(const Philox& p, const Stream& s, const Pack& at, T (&out)[N]) {
  if constexpr (N == kDrawn<T>) {
    normals(s, at.start, out);
  } else {
    constexpr int M = kDrawn<T>;
    const int64_t element = p.linear ? at.start : view_offset(at, p.stride);
    T drawn[M];
    normals(s, element / M * M, drawn);
    out[0] = drawn[0];
#pragma unroll
    for (int k = 1; k < M; ++k) out[0] = element % M == k ? drawn[k] : out[0];
  }
}

}  // namespace vaefast
