#include "cpu/reconstruction_loops.h"
#include "likelihoods/compound.h"

namespace vaefast {
inline namespace VF_ISA {

template void run_reconstruction<float, CompoundLikelihoods>(int, const ReconstructionProblem&, int64_t, int64_t);
template void run_reconstruction<double, CompoundLikelihoods>(int, const ReconstructionProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
