// The words that the kernels' noise is made of, on standard output without end: little-endian, as philox.h computes
// them, in the order in which a sample's elements read them.
//
//   stream counters SEED        of one key, from counter 0 on: one sample after the other of one offset
//   stream calls SEED COUNTERS  of the keys SEED, SEED + 1, ..: the first COUNTERS counters of each, as calls whose
//                               seeds follow each other would read them
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "philox.h"

namespace {

constexpr uint64_t kCounters = 1 << 14;  // of a block

void fill(std::vector<uint32_t>& block, uint64_t counter, uint64_t count, uint64_t key, uint64_t at) {
  for (uint64_t i = 0; i < count; ++i) {
    const vaefast::Words x = vaefast::philox4x32(counter + i, 0, key);
    for (int j = 0; j < 4; ++j) block[4 * (at + i) + j] = x.w[j];
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  const bool calls = mode == "calls" && argc == 4;
  if (!calls && !(mode == "counters" && argc == 3)) {
    std::fprintf(stderr, "stream counters SEED | stream calls SEED COUNTERS\n");
    return 2;
  }
  const uint64_t seed = std::strtoull(argv[2], nullptr, 0);
  const uint64_t each = calls ? std::strtoull(argv[3], nullptr, 0) : kCounters;
  if (each < 1 || each > kCounters) {
    std::fprintf(stderr, "COUNTERS is from 1 to %llu\n", static_cast<unsigned long long>(kCounters));
    return 2;
  }
  const uint64_t keys = kCounters / each;
  std::vector<uint32_t> block(4 * each * keys);
  for (uint64_t n = 0;; n += keys) {
    for (uint64_t k = 0; k < keys; ++k) {
      calls ? fill(block, 0, each, seed + n + k, each * k) : fill(block, n * kCounters, kCounters, seed, 0);
    }
    if (std::fwrite(block.data(), 4, block.size(), stdout) != block.size()) return 0;  // the reader has enough
  }
}
