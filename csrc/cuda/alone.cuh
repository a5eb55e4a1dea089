// A problem that is no part of a job: its units' work, and the sums that they leave. No torch types here.
#pragma once

#include "cuda/kernel.cuh"

namespace vaefast {

constexpr int kWarps = kThreads / kWarp;

// The sum over so many lanes next to each other, in all of them.
template <class T>
__device__ __forceinline__ T sum_of_lanes(T x, int lanes) {
  join_lanes(x, lanes, [](T a, T b) { return a + b; });
  return x;
}

// Of what a block's warps have in each lane the sum, in the first one.
__device__ inline double sum_of_warps(double x, double (&shared)[kWarps][kWarp]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  shared[warp][lane] = x;
  __syncthreads();
  if (warp != 0) return 0;
  for (int k = 1; k < kWarps; ++k) x += shared[k][lane];
  return x;
}

template <class Problem>
struct Alone {
  Problem problem;
  Geometry cut;
  uint32_t rows = 1;            // sums to finish
  unsigned* counter = nullptr;  // as Launch's
};

template <class T, class Work>
__global__ void __launch_bounds__(kThreads, 2) alone_kernel(const __grid_constant__ Alone<typename Work::Problem> a) {
  __shared__ double shared[kWarps];
  run_block<Work>(a.problem, a.cut, 0, reinterpret_cast<T*>(shared));
  if (a.counter && last_block(a.counter)) finish_rows<T>(a.problem.sum, a.cut, 0, a.rows, shared);
}

}  // namespace vaefast
