// Standard normal noise for a pack: the same (seed, counter, element) function as cpu/noise.h. No torch types here.
#pragma once

#include "cuda/pack.cuh"
#include "philox.h"

namespace vaefast {

struct Stream {
  uint64_t key, counter;
};

// The seed and first counter of a launch; one thread keeps them for backward.
__device__ inline Stream open_stream(const Philox& p, bool first_thread) {
  const uint64_t key = p.seed ? uint64_t(*p.seed) : p.seed_value;
  const uint64_t offset = (p.offset ? uint64_t(*p.offset) : p.offset_value) + p.offset_add;
  const Stream s{key, offset >> p.offset_shift};
  if (p.save && first_thread) {
    p.save[0] = int64_t(s.key);
    p.save[1] = int64_t(s.counter);
  }
  return s;
}

// The normals of elements start .. start + kPack - 1, with start a multiple of kPack.
__device__ inline void normals(const Stream& s, int64_t start, float (&out)[4]) {
  const Words x = philox4x32(s.counter + uint64_t(start / 4), 0, s.key);
  box_muller(uniform(x.w[0]), turns(x.w[1]), out[0], out[1]);
  box_muller(uniform(x.w[2]), turns(x.w[3]), out[2], out[3]);
}

__device__ inline void normals(const Stream& s, int64_t start, double (&out)[2]) {
  const Words x = philox4x32(s.counter + uint64_t(start / 4), uint32_t(start / 2 % 2), s.key);
  box_muller(uniform(x.w[0], x.w[1]), turns(x.w[2], x.w[3]), out[0], out[1]);
}

template <class T>
__device__ inline void read_noise(const Philox& p, const Stream& s, const Pack& at, T (&out)[kPack<T>]) {
  constexpr int N = kPack<T>;
  if (p.linear && at.start % N == 0) return normals(s, at.start, out);
  // elements that straddle packs: draw a pack when it changes, pick from it and shift into place (see read_as)
  T drawn[N] = {};
  int64_t which = -1;
#pragma unroll 1
  for (int i = 0; i < N; ++i) {
    const int64_t element = i < at.n ? offset_of(at.space, p.stride, p.linear, at.start + i) : 0;
    if (element / N != which) {
      which = element / N;
      normals(s, which * N, drawn);
    }
    const int j = int(element % N);
    T x = drawn[0];
#pragma unroll
    for (int k = 1; k < N; ++k) x = j == k ? drawn[k] : x;
#pragma unroll
    for (int k = 0; k + 1 < N; ++k) out[k] = out[k + 1];
    out[N - 1] = x;
  }
}

}  // namespace vaefast
