// What a SIMD unit offers to the baseline code: loops over units of work, free of torch types.
//
// A unit is up to kUnit consecutive elements of one row (one row of everything where no per-row sums are wanted). Units
// are fixed by the sizes alone, so the sums do not depend on the number of threads.
#pragma once

#include "problems.h"

namespace vaefast {

constexpr int64_t kUnit = 2048;

// Of a mixture's sites, which are so many numbers each, it takes fewer; a tile of them has at most kSites.
constexpr int kSites = 128;
VF_HD int64_t unit_of(int planes) {
  if (planes == 1) return kUnit;
  const int64_t sites = 4 * kUnit / planes / 64 * 64;
  return sites > 64 ? sites : 64;
}

// numbers of the posteriors' that a log ratio's backward takes together: few, for the threads to have equal parts
constexpr int kColumns = 256;

// columns of a product of experts that are computed together
constexpr int kStretch = 1024;

// weights that IVON takes together
constexpr int kWeights = 1024;

// Chunks of a mixture's samples, `together` of which are computed at a time, a multiple of kSampleLanes. Each has
// `each` numbers of scratch, of which MixtureProblem's sums come first and are yet to be added up.
struct MixtureChunks {
  static constexpr int64_t kSampleLanes = 16;  // as many as any instruction set has

  int64_t count = 1, together = kSampleLanes, each = 0;
  double* scratch = nullptr;

  MixtureChunks(const MixtureProblem& p, int64_t count, int64_t together) : count(count), together(together) {
    const int64_t of_samples = (2 * p.latents + p.components) * together, of_lanes = 2 * p.latents * kSampleLanes;
    each = 2 * p.sums() + of_samples + of_lanes;
  }
};

struct CpuKernels {
  // Runs units [begin, end); the sum over unit u, if one is wanted, goes to sum.partial[u].
  void (*posterior)(const PosteriorProblem&, int64_t begin, int64_t end);
  void (*reconstruction)(const ReconstructionProblem&, int64_t begin, int64_t end);
  // Runs tasks [begin, end), each a chunk of the samples for one latent: latents * chunks of them.
  void (*marginals)(const MarginalsProblem&, int64_t begin, int64_t end);
  // Runs sites [begin, end).
  void (*categorical)(const CategoricalProblem&, int64_t begin, int64_t end);
  // Runs rows [begin, end), of which each draw has one for each sample, or backward blocks of kColumns.
  void (*log_ratio)(const LogRatioProblem&, int64_t begin, int64_t end);
  // Runs stretches [begin, end) of kStretch columns.
  void (*experts)(const ExpertsProblem&, int64_t begin, int64_t end);
  // Runs chunks [begin, end).
  void (*mixture)(const MixtureProblem&, const MixtureChunks&, int64_t begin, int64_t end);
  // Runs units [begin, end) of kWeights weights.
  void (*ivon)(const IvonProblem&, int64_t begin, int64_t end);
};

// Each is defined where the build has it; see cpu/launch.cpp. A wheel has them in a library of their own.
#define VF_EXPORTED __attribute__((visibility("default")))
VF_EXPORTED const CpuKernels& cpu_kernels_DEFAULT();
VF_EXPORTED const CpuKernels& cpu_kernels_AVX2();
VF_EXPORTED const CpuKernels& cpu_kernels_AVX512();

}  // namespace vaefast
