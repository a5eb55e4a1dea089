// Posteriors whose arithmetic is double.

#include "cpu/posterior_loops.h"

namespace vaefast {
inline namespace VF_ISA {

template void run_posterior<double>(const PosteriorProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
