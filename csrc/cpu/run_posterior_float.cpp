// Posteriors whose arithmetic is float (of half precision too).

#include "cpu/posterior_loops.h"

namespace vaefast {
inline namespace VF_ISA {

template void run_posterior<float>(const PosteriorProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
