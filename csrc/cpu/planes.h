// An operand with several numbers a site: its planes, which a tile of sites brings into a buffer of `width` sites a
// plane, and back.
#pragma once

#include "cpu/tile.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// An operand whose planes lie `step` elements of memory apart: `count` of them, from the `first` on.
struct PlaneOperand {
  const Operand& op;
  int64_t step;
  int count;
  int64_t first = 0;
};

// Of n sites, `inner` elements of memory apart from `offset` on, and at `at` in the buffer: f(element of memory, step
// there, count, position in the buffer, step there) for each run, the closer of sites and planes innermost.
template <class F>
VF_HD void for_planes(const PlaneOperand& o, int64_t inner, int at, int n, int64_t offset, int width, const F& f) {
  offset += o.first * o.step;
  if (n == 1 || o.step < inner) {
    for (int i = 0; i < n; ++i) f(offset + i * inner, o.step, o.count, at + i, width);
  } else {
    for (int k = 0; k < o.count; ++k) f(offset + k * o.step, inner, n, k * width + at, 1);
  }
}

template <class F>
VF_HD void for_plane_runs(const PlaneOperand& o, const Tile& t, int width, const F& f) {
  const int64_t inner = o.op.stride[t.space.ndim - 1];
  for_runs(t, o.op.stride, [&](int at, int n, int64_t offset) { for_planes(o, inner, at, n, offset, width, f); });
}

}  // namespace
}  // namespace VF_ISA
}  // namespace vaefast
