// The loop over gradients that an earlier call left.

#include "cpu/kernels.h"
#include "cpu/runs.h"
#include "cpu/tile.h"

namespace vaefast {
inline namespace VF_ISA {

template <class T>
double rescale_tile(const ReconstructionProblem& p, const Tile& t) {
  Buffer<T> upstream_buffer, grad_buffer, out_buffer;
  const T* upstream = read(p.upstream, t, upstream_buffer);
  for (int k = 0; k < p.nparams; ++k) {
    const T* grad = read(p.out_grad[k], t, grad_buffer);
    T* out = writable(p.out_grad[k], t, out_buffer);
    for_vectors<T>(t.n, [&](int i) { put(out, i, at(grad, i) * at(upstream, i)); });
    write_back(p.out_grad[k], t, out_buffer);
  }
  return 0;
}

template <class T>
void run_rescale(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  for_units(p.space, nullptr, kUnit, kTile, begin, end, [&](const Tile& t) { return rescale_tile<T>(p, t); });
}

template void run_rescale<float>(const ReconstructionProblem&, int64_t, int64_t);
template void run_rescale<double>(const ReconstructionProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
