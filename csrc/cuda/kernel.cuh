// The kernel: one launch for a posterior, a reconstruction, or both, with their sums. Blocks take units; each unit's
// sum goes to its place in `partial`; the last block to finish adds those up in a fixed order. No torch types here.
#pragma once

#include "cuda/units.cuh"

namespace vaefast {

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 4;

// How a problem is cut: groups of `width` threads, a unit each; units of at most `unit` elements of one row.
struct Geometry {
  int width = kThreads;
  int64_t unit = 1, per_row = 0, count = 0, blocks = 0;
};

template <class T>
Geometry geometry_of(const Space& s) {
  Geometry g;
  const int64_t cols = s.rows ? s.numel / s.rows : 0;
  // short rows share a block, a warp each; long ones are split
  const int64_t short_row = int64_t(32) * kPack<T> * kPacksPerThread;
  g.width = s.rows > 1 && cols <= short_row ? 32 : kThreads;
  g.unit = int64_t(g.width) * kPack<T> * kPacksPerThread;
  g.per_row = (cols + g.unit - 1) / g.unit;
  g.count = g.per_row * s.rows;
  g.blocks = (g.count * g.width + kThreads - 1) / kThreads;
  return g;
}

struct Launch {
  ReconstructionProblem reconstruction;
  PosteriorProblem posterior;
  Geometry rec, post;  // blocks [0, rec.blocks) take the reconstruction, the rest the posterior
  void* total = nullptr;
  double beta = 1.0;
  unsigned* counter = nullptr;  // 0 before and after; null where there is nothing to add up
};

// No problem of this kind in the launch.
struct Nothing {};

// Sum over the threads of a group, valid in its lane 0: shuffles, then one value a warp through shared memory.
template <class T>
__device__ inline T group_sum(T x, int width, T* shared) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  if (width == 32) return x;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) shared[warp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < kThreads / 32; ++k) x += shared[k];
  }
  __syncthreads();
  return x;
}

template <class Work, class Problem>
__device__ inline void run_block(const Problem& p, const Geometry& g, int64_t block, typename Work::T* shared) {
  const int64_t unit = (block * kThreads + threadIdx.x) / g.width;
  const int lane = threadIdx.x % g.width;
  typename Work::T sum = 0;
  if (unit < g.count) {
    const int64_t cols = p.space.numel / p.space.rows, row = unit / g.per_row;
    const int64_t first = row * cols + (unit % g.per_row) * g.unit, end = (row + 1) * cols;
    const Unit u{first, first + g.unit < end ? first + g.unit : end, lane, g.width};
    sum = Work::run(p, u, block == 0 && threadIdx.x == 0);
  }
  if (!p.sum.partial) return;
  sum = group_sum(sum, g.width, shared);
  if (lane == 0 && unit < g.count) p.sum.partial[unit] = double(sum);
}

// out[row] = scale * (the row's partials, added in an order that the sizes alone decide), by one whole block.
template <class T>
__device__ inline void finish_rows(const Sum& s, const Geometry& g, int64_t rows, double* shared) {
  T* out = static_cast<T*>(s.out);
  // volatile: written by other blocks during this launch
  const volatile double* partial = s.partial;
  if (rows >= kThreads) {
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      double sum = 0;
      for (int64_t k = 0; k < g.per_row; ++k) sum += partial[row * g.per_row + k];
      out[row] = T(s.scale * sum);
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t k = threadIdx.x; k < g.per_row; k += kThreads) sum += partial[row * g.per_row + k];
    sum = group_sum(sum, kThreads, shared);
    if (threadIdx.x == 0) out[row] = T(s.scale * sum);
  }
}

template <class T>
__device__ inline void finish(const Launch& a, double* shared) {
  if (a.reconstruction.sum.partial) finish_rows<T>(a.reconstruction.sum, a.rec, a.reconstruction.space.rows, shared);
  if (a.posterior.sum.partial) finish_rows<T>(a.posterior.sum, a.post, a.posterior.space.rows, shared);
  if (!a.total) return;
  __syncthreads();
  const T* nll = static_cast<const T*>(a.reconstruction.sum.out);
  const T* kl = static_cast<const T*>(a.posterior.sum.out);
  for (int64_t row = threadIdx.x; row < a.posterior.space.rows; row += kThreads) {
    static_cast<T*>(a.total)[row] = T(double(nll[row]) + a.beta * double(kl[row]));
  }
}

// True in every thread of the last block to arrive; what the others wrote before is visible then.
__device__ inline bool last_block(unsigned* counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

template <class T, class Rec, class Post>
__global__ void __launch_bounds__(kThreads) job_kernel(const __grid_constant__ Launch a) {
  __shared__ double shared[kThreads / 32];
  const int64_t block = blockIdx.x;
  if (block < a.rec.blocks) {
    if constexpr (!std::is_same_v<Rec, Nothing>) {
      run_block<Rec>(a.reconstruction, a.rec, block, reinterpret_cast<T*>(shared));
    }
  } else {
    if constexpr (!std::is_same_v<Post, Nothing>) {
      run_block<Post>(a.posterior, a.post, block - a.rec.blocks, reinterpret_cast<T*>(shared));
    }
  }
  if (a.counter && last_block(a.counter)) finish<T>(a, shared);
}

// kept *= upstream, and nothing at all where upstream is 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ Operand kept, const __grid_constant__ Space space,
                 const __grid_constant__ Operand upstream) {
  T factor[kPack<T>];
  read(upstream, Pack{space, 0, 1}, factor);
  if (factor[0] == T(1)) return;
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPack<T> * kPacksPerThread;
  const int64_t end = first + int64_t(kThreads) * kPack<T> * kPacksPerThread;
  const Unit u{first, end < space.numel ? end : space.numel, int(threadIdx.x), kThreads};
  for_packs<T>(space, u, [&](const Pack& at) {
    T x[kPack<T>];
    read(kept, at, x);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] *= factor[0];
    write(kept, at, x);
  });
}

}  // namespace vaefast
