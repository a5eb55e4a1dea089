// A small SIMT executor: runs CUDA device code, compiled by the host compiler, one block after another and every thread
// of a block as a fiber. Barriers and shuffles are rendezvous; between them the order of threads, how far warps drift
// apart, and the order of blocks are drawn from a seed, so that a missing barrier or a dependence on the order shows as
// a wrong result. A barrier that some threads of the block never reach is an error.
//
// It is included before any device code and defines what nvcc would.
#pragma once

#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
using cudaStream_t = void*;

namespace simt {

// The running thread's place.
extern Index thread, block, block_size, grid_size;

// Waits for every thread of the block (of the warp), then lets all go on.
void block_barrier();
void warp_barrier();

// A slot a lane, of the running thread's warp. Every other call gives other slots: a lane may then write for the next
// shuffle while a slower one still reads for this.
uint64_t* warp_slots();

void run(const void* kernel, int64_t blocks, int threads, const std::function<void()>& body);

// The value of the lane that is so many further on, or its own where there is none.
template <class T>
T shuffle_by(T value, int delta) {
  static_assert(sizeof(T) <= 8);
  const int lane = int(thread.x % 32), from = lane + delta;
  uint64_t* slots = warp_slots();
  T result = value;
  __builtin_memcpy(&slots[lane], &value, sizeof(T));
  warp_barrier();
  if (from >= 0 && from < 32) __builtin_memcpy(&result, &slots[from], sizeof(T));
  return result;
}

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= 8);
  const unsigned lane = thread.x % 32;
  uint64_t* slots = warp_slots();
  T result;
  __builtin_memcpy(&slots[lane], &value, sizeof(T));
  warp_barrier();
  __builtin_memcpy(&result, &slots[lane ^ mask], sizeof(T));
  return result;
}

}  // namespace simt

#define threadIdx ::simt::thread
#define blockIdx ::simt::block
#define blockDim ::simt::block_size
#define gridDim ::simt::grid_size

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp() { simt::warp_barrier(); }

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return simt::shuffle_by(value, delta);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return simt::shuffle_by(value, -delta);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::shuffle_xor(value, mask);
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline unsigned atomicAdd(unsigned* to, unsigned x) {
  const unsigned old = *to;
  *to += x;
  return old;
}
