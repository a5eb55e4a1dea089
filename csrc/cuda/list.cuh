// One launch for a list of posteriors. They differ in where their operands lie, in their sizes and in the noise that is
// theirs, which a table by value tells, and in nothing else that the kernel reads. No torch types here.
#pragma once

#include "cuda/kernel.cuh"

namespace vaefast {

constexpr int kPosteriorOperands = 13;

struct Listed {
  void* data[kPosteriorOperands] = {};  // by Operand::number
  Geometry cut;
  uint64_t skipped = 0;        // Philox counters of those before it
  uint32_t first_block = 0;    // in the launch
  uint32_t first_partial = 0;  // among the sums of a row
};

constexpr int kListed = 128;

struct ListLaunch {
  PosteriorProblem posterior;   // the first one's
  Geometry sums;                // how many partial sums a row has in all launches together
  unsigned* counter = nullptr;  // as Launch's
  uint32_t count = 0;
  Listed list[kListed];
};
static_assert(sizeof(ListLaunch) <= 32764, "more than a launch takes by value");

template <class T, class Post>
__global__ void __launch_bounds__(kThreads, 2) list_kernel(const __grid_constant__ ListLaunch a) {
  __shared__ double shared[kThreads / kWarp];
  // the last one that begins at this block or before
  uint32_t index = 0, end = a.count;
  while (end - index > 1) {
    const uint32_t middle = (index + end) / 2;
    (a.list[middle].first_block <= blockIdx.x ? index : end) = middle;
  }
  const Listed& one = a.list[index];
  const Sum& out = a.posterior.sum;
  T sum = run_unit<Post, true>(a.posterior, one.cut, one.first_block, one.data, one.skipped);
  if (Post::kSums && out.out) {
    sum = group_sum(sum, one.cut.width, reinterpret_cast<T*>(shared));
    const Place at = place_of(one.cut, one.first_block);
    if (at.lane == 0 && at.unit < one.cut.count) {
      const uint32_t row = row_of(one.cut, at.unit);
      const uint32_t place = one.first_partial + at.unit - row * one.cut.per_row;
      out.partial[int64_t(row) * a.sums.per_row + place] = double(sum);
    }
  }
  if (a.counter && last_block(a.counter)) finish_rows<T>(out, a.sums, 0, uint32_t(a.posterior.space.rows), shared);
}

}  // namespace vaefast
