// IVON's draws and steps (IvonProblem), of weights that lie one after the other.

#include "cpu/kernels.h"
#include "cpu/noise.h"
#include "cpu/runs.h"
#include "cpu/tile.h"
#include "ivon.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// n weights from `first` on, a whole number of Philox counters.
template <class T>
void draw(const IvonProblem& p, int64_t first, int n) {
  static_assert(kWeights <= kTile);
  Buffer<T> eps;
  const uint64_t key = uint64_t(*p.philox.seed), counter = uint64_t(*p.philox.offset) + p.philox.offset_add;
  normal_range(counter, key, first, n, eps.data);
  T *param = static_cast<T*>(p.param) + first, *mean = static_cast<T*>(p.mean) + first;
  T* noise = static_cast<T*>(p.noise) + first;
  const T* hess = static_cast<const T*>(p.hess) + first;
  for_some<T>(n, [&](int i, int left) {
    const Wide<T> m = load_some(param + i, left);
    const Wide<T> apart = ivon_std(p.numbers, load_some(hess + i, left)) * at(eps.data, i);
    store_some(mean + i, m, left);
    store_some(noise + i, apart, left);
    store_some(param + i, m + apart, left);
  });
}

template <class T>
void step(const IvonProblem& p, int64_t first, int n) {
  T *param = static_cast<T*>(p.param) + first, *momentum = static_cast<T*>(p.momentum) + first;
  T* hess = static_cast<T*>(p.hess) + first;
  const T *gradient = static_cast<const T*>(p.gradient) + first, *product = static_cast<const T*>(p.product) + first;
  for_some<T>(n, [&](int i, int left) {
    Wide<T> m = load_some(param + i, left), g = load_some(momentum + i, left), h = load_some(hess + i, left);
    ivon_update(p.numbers, load_some(gradient + i, left), load_some(product + i, left), m, g, h);
    store_some(param + i, m, left);
    store_some(momentum + i, g, left);
    store_some(hess + i, h, left);
  });
}

}  // namespace

template <class T>
void run_ivon(const IvonProblem& p, int64_t begin, int64_t end) {
  for (int64_t first = begin * kWeights; first < p.numel && first < end * kWeights; first += kWeights) {
    const int n = int(p.numel - first < kWeights ? p.numel - first : kWeights);
    p.draw ? draw<T>(p, first, n) : step<T>(p, first, n);
  }
}

template void run_ivon<float>(const IvonProblem&, int64_t, int64_t);
template void run_ivon<double>(const IvonProblem&, int64_t, int64_t);

}  // namespace VF_ISA
}  // namespace vaefast
