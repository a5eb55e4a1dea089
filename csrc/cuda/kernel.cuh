// The kernel: one launch for a posterior, a reconstruction, or both, with their sums. Blocks take units; each unit's
// sum goes to its place in `partial`; the last block to finish adds those up in a fixed order. No torch types here.
#pragma once

#include "cuda/classes.cuh"

namespace vaefast {

// No problem of this kind in the launch.
struct Nothing {};

constexpr int kPacksPerThread = 4;

// Work on the plain path (plain.cuh), which says itself how many blocks a multiprocessor is to hold.
template <class Work>
constexpr bool kPlainWork = false;

// Leaves 80 (128) registers a thread: what kernels need, and enough threads to hide memory's latency. A sample with its
// KL, and what runs beside a gradient of the KL, need more of the first and, with more loads a thread, fewer of the
// second; a mixture in double, 168.
template <class T, class Rec, class Post>
constexpr int blocks_per_sm() {
  if constexpr (kPlainWork<Rec>) {
    return Rec::kBlocks < Post::kBlocks ? Rec::kBlocks : Post::kBlocks;
  } else if constexpr (kPlainWork<Post>) {
    return Post::kBlocks;
  } else if (sizeof(T) == 8) {
    return kMixtureWork<Rec> ? 1 : 2;
  } else {
    const bool sample_and_kl =
        std::is_same_v<Post, PosteriorForward<T, true, true>> || std::is_same_v<Post, PosteriorBackward<T, true, true>>;
    const bool beside = !std::is_same_v<Rec, Nothing> && std::is_same_v<Post, PosteriorBackward<T, false, true>>;
    return sample_and_kl || beside ? 2 : 3;
  }
}

// Larger problems get longer units, so that the last block has few partial sums to add.
constexpr int64_t kMaxUnits = 8192;
// Smaller ones get shorter units, so that a GPU's multiprocessors all have one.
constexpr int64_t kLeastUnits = 256;
// More rows than this are finished by a launch of their own, a stretch a block, and not by the last block.
constexpr int64_t kRowsOfOneBlock = 1024;

// How a problem is cut: groups of `width` threads, a unit each; units of at most `unit` elements of one row. It follows
// from the sizes alone, and so does the order in which sums are added.
struct Geometry {
  int64_t cols = 0, unit = 1, blocks = 0;
  uint32_t per_row = 0, count = 0;
  int width = kThreads;

  // Whether a unit's number fits; nothing else of the geometry can be relied on where it does not.
  bool fits() const { return blocks * (kThreads / width) <= 0xffffffff; }
};

// each: elements that a thread has at least. most: units that a long row is cut into at most. lanes: threads that share
// an element.
template <class T>
Geometry geometry_of(const Space& s, int each, int64_t most = kMaxUnits, int lanes = 1) {
  Geometry g;
  g.cols = s.rows ? s.numel / s.rows : 0;
  while (s.rows == 1 && each > kPack<T> && s.numel * lanes < kLeastUnits * kThreads * each) each /= 2;
  // short rows share a block, a warp each; long ones are split
  if (s.rows > 1 && g.cols <= int64_t(kWarp) * each / lanes) g.width = kWarp;
  const int64_t least = int64_t(g.width) * each / lanes;
  g.unit = least * (g.width == kWarp ? 2 : 1 + s.numel / (least * most));
  // a row need not begin where a pack does
  const int64_t reach = g.cols + (s.rows > 1 ? kPack<T> - 1 : 0);
  const int64_t per_row = g.cols ? (reach + g.unit - 1) / g.unit : 0;
  g.per_row = uint32_t(per_row);
  const int64_t count = per_row * s.rows;
  g.count = uint32_t(count);
  g.blocks = (count * g.width + kThreads - 1) / kThreads;
  return g;
}

// Elements that a thread has at least. In 16 bits a pack may be of 8: with as many packs a thread of one long row, a
// block has more to do before it adds up its part of the sum, which takes it some 2 us.
template <class T>
int least_of(const Space& s, const Sum& sum) {
  const bool halves = s.moves == Moves::kPlainHalf || s.moves == Moves::kPlainBFloat16;
  return kPack<T> * kPacksPerThread * (halves && sum.out && s.rows == 1 ? 2 : 1);
}

struct Launch {
  ReconstructionProblem reconstruction;
  PosteriorProblem posterior;
  Geometry rec, post;  // blocks [0, rec.blocks) take the reconstruction, the rest the posterior
  void* total = nullptr;
  double beta = 1.0;
  uint32_t rows = 1;            // sums to finish
  unsigned* counter = nullptr;  // 0 before and after; null where nothing is left to the last block
};

// Sum over the threads of a group, valid in its lane 0: shuffles, then one value a warp through shared memory.
template <class T>
__device__ inline T group_sum(T x, int width, T* shared) {
  if (width == 1) return x;
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_down_sync(0xffffffffu, x, step);
  if (width == kWarp) return x;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[warp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < kThreads / kWarp; ++k) x += shared[k];
  }
  __syncthreads();
  return x;
}

// A thread's unit, and its number among the threads of that unit.
struct Place {
  uint32_t unit;
  int lane;
};

__device__ inline Place place_of(const Geometry& g, uint32_t first_block) {
  uint32_t block = blockIdx.x - first_block, thread = threadIdx.x;
#if defined(__CUDA_ARCH__)
  // computed each time it is asked for: kept over a unit's loop it would take registers there
  asm volatile("" : "+r"(block), "+r"(thread));
#endif
  if (g.width == kThreads) return {block, int(thread)};
  return {block * (kThreads / kWarp) + thread / kWarp, int(thread % kWarp)};
}

__device__ inline uint32_t row_of(const Geometry& g, uint32_t unit) {
  return g.per_row == 1 ? unit : g.per_row == g.count ? 0 : unit / g.per_row;
}

// A thread's part of its unit's sum. `data` and `skipped`: see Unit.
template <class Work, bool LISTED, class Problem>
__device__ inline typename Work::T run_unit(const Problem& p, const Geometry& g, uint32_t first_block,
                                            void* const* data = nullptr, uint64_t skipped = 0) {
  using T = typename Work::T;
  const auto [unit, lane] = place_of(g, first_block);
  if (unit >= g.count) return 0;
  const uint32_t row = row_of(g, unit);
  const int64_t begin = row * g.cols, end = begin + g.cols;
  // cut where packs begin
  const int64_t from = begin / kPack<T> * kPack<T> + int64_t(unit - row * g.per_row) * g.unit;
  const Unit u{from < begin ? begin : from, from + g.unit < end ? from + g.unit : end, lane, g.width, data, skipped};
  const bool first = unit == 0 && lane == 0 && (!LISTED || blockIdx.x == 0);
  if constexpr (kPlainWork<Work>) {
    return Work::run(p, u, first);
  } else if constexpr (kMixtureWork<Work>) {
    return Work::template run<Move<1>>(p, u, first);
  } else {
    return visit<T, LISTED>(p.space.moves, [&](auto move) { return Work::template run<decltype(move)>(p, u, first); });
  }
}

template <class Work, class Problem>
__device__ inline void run_block(const Problem& p, const Geometry& g, uint32_t first_block, typename Work::T* shared) {
  using T = typename Work::T;
  T sum = run_unit<Work, false>(p, g, first_block);
  if (!Work::kSums || !p.sum.out) return;
  sum = group_sum(sum, g.width, shared);
  const Place at = place_of(g, first_block);
  if (at.lane != 0 || at.unit >= g.count) return;
  if (g.per_row == 1) {
    static_cast<T*>(p.sum.out)[at.unit] = T(p.sum.scale * double(sum));
  } else {
    p.sum.partial[at.unit] = double(sum);
  }
}

// Beside much code: alone it gets the registers that it needs.
template <class Work, class Problem>
__device__ __noinline__ void run_block_apart(const Problem& p, const Geometry& g, uint32_t first_block,
                                             typename Work::T* shared) {
  run_block<Work>(p, g, first_block, shared);
}

// finish_rows() by a group of WIDTH threads a row. The width is known beforehand, so that all loads have one address
// and distances from it: an address for each would leave registers for half as many.
template <int WIDTH, class T>
__device__ inline void finish_rows_by(const Sum& s, const Geometry& g, uint32_t row, uint32_t end, double* shared) {
  constexpr int kAtOnce = 16;
  const int lane = threadIdx.x % WIDTH;
#pragma unroll 1
  for (row += threadIdx.x / WIDTH; row < end; row += kThreads / WIDTH) {
    const double* at = s.partial + int64_t(row) * g.per_row + lane;
    double sum = 0;
#pragma unroll 1
    for (int left = int(g.per_row) - lane; left > 0; left -= kAtOnce * WIDTH, at += kAtOnce * WIDTH) {
      double x[kAtOnce];
      // from L2, where the other blocks left it; all loads are under way before the first is added
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) x[k] = left > k * WIDTH ? __ldcg(at + k * WIDTH) : 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += x[k];
    }
    sum = group_sum(sum, WIDTH, shared);
    if (lane == 0) static_cast<T*>(s.out)[row] = T(s.scale * sum);
  }
}

// out[row] = scale * (the row's partials, added in an order that the sizes alone decide) of rows [row, end), by one
// whole block.
template <class T>
__device__ inline void finish_rows(const Sum& s, const Geometry& g, uint32_t row, uint32_t end, double* shared) {
  if (!s.out || g.per_row == 1) return;
  // few long rows: the block takes one after the other; else a warp or a thread each
  if (end - row < kThreads / kWarp) {
    finish_rows_by<kThreads, T>(s, g, row, end, shared);
  } else if (g.per_row >= kWarp / 2) {
    finish_rows_by<kWarp, T>(s, g, row, end, shared);
  } else {
    finish_rows_by<1, T>(s, g, row, end, shared);
  }
}

template <class T>
__device__ inline void finish(const Launch& a, uint32_t row, uint32_t end, double* shared) {
  finish_rows<T>(a.reconstruction.sum, a.rec, row, end, shared);
  finish_rows<T>(a.posterior.sum, a.post, row, end, shared);
  if (!a.total) return;
  __syncthreads();
  const T* nll = static_cast<const T*>(a.reconstruction.sum.out);
  const T* kl = static_cast<const T*>(a.posterior.sum.out);
#pragma unroll 4
  for (row += threadIdx.x; row < end; row += kThreads) {
    static_cast<T*>(a.total)[row] = T(double(__ldcg(nll + row)) + a.beta * double(__ldcg(kl + row)));
  }
}

// True in every thread of the last block to arrive; what the others wrote before is visible then.
__device__ inline bool last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Releases what the block wrote before the barrier, and acquires what the other blocks released. A fence by every
    // thread would say the same at some microseconds a block.
#if defined(__CUDA_ARCH__)
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
#else
    const unsigned before = atomicAdd(counter, 1u);
#endif
    last = before == gridDim.x - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

template <class T, class Rec, class Post>
__global__ void __launch_bounds__(kThreads, (blocks_per_sm<T, Rec, Post>()))
    job_kernel(const __grid_constant__ Launch a) {
  __shared__ double shared[kThreads / kWarp];
  const uint32_t rec_blocks = uint32_t(a.rec.blocks);
  if (blockIdx.x < rec_blocks) {
    if constexpr (!std::is_same_v<Rec, Nothing>) {
      run_block<Rec>(a.reconstruction, a.rec, 0, reinterpret_cast<T*>(shared));
    }
  } else {
    if constexpr (kMixtureWork<Rec>) {
      run_block_apart<Post>(a.posterior, a.post, rec_blocks, reinterpret_cast<T*>(shared));
    } else if constexpr (!std::is_same_v<Post, Nothing>) {
      run_block<Post>(a.posterior, a.post, rec_blocks, reinterpret_cast<T*>(shared));
    }
  }
  if (a.counter && last_block(a.counter)) finish<T>(a, 0, a.rows, shared);
}

// What the last block of many rows is spared.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Launch a) {
  __shared__ double shared[kThreads / kWarp];
  const uint32_t row = blockIdx.x * kThreads;
  finish<T>(a, row, a.rows - row < kThreads ? a.rows : row + kThreads, shared);
}

}  // namespace vaefast
