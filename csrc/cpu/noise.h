// Standard normal noise for a tile, a vector of Philox counters at a time.
#pragma once

#include "cpu/tile.h"
#include "philox.h"

namespace vaefast {
inline namespace VF_ISA {

constexpr int kCounters = 16;
constexpr int kGroup = 4 * kCounters;  // normals from one pass over kCounters counters

// out[4 l + j] is normal j of counter + l
VF_HD void normal_group(uint64_t counter, uint64_t key, float* out) {
  alignas(64) uint32_t w[4][kCounters];
  for (int l = 0; l < kCounters; ++l) {
    const Words x = philox4x32(counter + l, 0, key);
    for (int j = 0; j < 4; ++j) w[j][l] = x.w[j];
  }
  alignas(64) float u[2][kCounters], t[2][kCounters];
  for (int k = 0; k < 2; ++k) {
    for (int l = 0; l < kCounters; ++l) {
      u[k][l] = uniform(w[2 * k][l]);
      t[k][l] = turns(w[2 * k + 1][l]);
    }
  }
  using V = Vec<float>;
  for (int l = 0; l < kCounters; l += V::size()) {
    V n[4];
    for (int k = 0; k < 2; ++k) box_muller(V::loadu(u[k] + l), V::loadu(t[k] + l), n[2 * k], n[2 * k + 1]);
    const auto [p0, p1] = at::vec::interleave2(n[0], n[2]);
    const auto [q0, q1] = at::vec::interleave2(n[1], n[3]);
    const auto [o0, o1] = at::vec::interleave2(p0, q0);
    const auto [o2, o3] = at::vec::interleave2(p1, q1);
    o0.store(out + 4 * l);
    o1.store(out + 4 * l + V::size());
    o2.store(out + 4 * l + 2 * V::size());
    o3.store(out + 4 * l + 3 * V::size());
  }
}

VF_HD void normal_group(uint64_t counter, uint64_t key, double* out) {
  using V = Vec<double>;
  alignas(64) double u[2][kCounters], t[2][kCounters], n[4][kCounters];
  for (int k = 0; k < 2; ++k) {
    for (int l = 0; l < kCounters; ++l) {
      const Words x = philox4x32(counter + l, k, key);
      u[k][l] = uniform(x.w[0], x.w[1]);
      t[k][l] = turns(x.w[2], x.w[3]);
    }
    for (int l = 0; l < kCounters; l += V::size()) {
      V a, b;
      box_muller(V::loadu(u[k] + l), V::loadu(t[k] + l), a, b);
      a.store(n[2 * k] + l);
      b.store(n[2 * k + 1] + l);
    }
  }
  for (int l = 0; l < kCounters; ++l) {
    for (int j = 0; j < 4; ++j) out[4 * l + j] = n[j][l];
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
  const uint64_t key = uint64_t(*philox.seed), counter = uint64_t(*philox.offset);
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

}  // namespace VF_ISA
}  // namespace vaefast
