// What goes through a list of posteriors one by one has in common.
#pragma once

#include <utility>

#include "arguments.h"

namespace vaefast {

// The posterior number k.
PosteriorInputs posterior_at(const MultiInputs& in, size_t k);

// Shares out one stream of noise: each sample has whole counters of it, four numbers each.
class Counters {
 public:
  // The first of the next sample's.
  int64_t take(const Tensor& sample) { return std::exchange(taken_, taken_ + (sample.numel() + 3) / 4); }
  int64_t taken() const { return taken_; }

 private:
  int64_t taken_ = 0;
};

}  // namespace vaefast
