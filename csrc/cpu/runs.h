// Where kernels.cpp meets the loops, whose arithmetic is in T: each of these is instantiated in a file of its own,
// run_*.cpp, so that they compile side by side (setup.py has small ones share a unit), and none again that a change
// leaves alone.
#pragma once

#include "cpu/kernels.h"

namespace vaefast {
inline namespace VF_ISA {

template <class T>
void run_posterior(const PosteriorProblem&, int64_t begin, int64_t end);
// The likelihood at `index` of the list Group.
template <class T, class Group>
void run_reconstruction(int index, const ReconstructionProblem&, int64_t begin, int64_t end);
template <class T>
void run_marginals(const MarginalsProblem&, int64_t begin, int64_t end);
template <class T>
void run_categorical(const CategoricalProblem&, int64_t begin, int64_t end);
template <class T>
void run_log_ratio(const LogRatioProblem&, int64_t begin, int64_t end);
template <class T>
void run_experts(const ExpertsProblem&, int64_t begin, int64_t end);
void run_mixture(const MixtureProblem&, const MixtureChunks&, int64_t begin, int64_t end);
template <class T>
void run_ivon(const IvonProblem&, int64_t begin, int64_t end);

}  // namespace VF_ISA
}  // namespace vaefast
