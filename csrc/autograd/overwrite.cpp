// Where a reconstruction's gradients may be written over its parameters.

#include "autograd/overwrite.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "autograd/node.h"
#include "operators/operators.h"

namespace vaefast {

namespace {

// Steps through memory: a size and a stride.
using Steps = c10::SmallVector<std::pair<int64_t, int64_t>, 8>;

Steps steps_of(const Tensor& t) {
  Steps steps;
  for (int64_t d = 0; d < t.dim(); ++d) steps.emplace_back(t.size(d), t.stride(d));
  return steps;
}

// Whether no two elements can be in one place: each step leads past all that the smaller ones reach. (Others may be
// disjoint too; it takes more than this to tell.)
bool disjoint(Steps steps) {
  std::sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  int64_t reached = 0;
  for (const auto& [size, stride] : steps) {
    if (size == 1) continue;
    if (stride <= reached) return false;
    reached += (size - 1) * stride;
  }
  return true;
}

// The same of two tensors, such as the halves of one.
bool disjoint(const Tensor& a, const Tensor& b) {
  if (!a.is_alias_of(b)) return true;
  if (a.sizes() != b.sizes() || a.strides() != b.strides() || a.scalar_type() != b.scalar_type()) return false;
  Steps steps = steps_of(a);
  steps.emplace_back(2, std::abs(a.storage_offset() - b.storage_offset()));
  return disjoint(std::move(steps));
}

// A result of the graph's, not the user's own tensor nor a view of it.
bool is_result(const Tensor& t) { return !t.is_leaf() && !(t.is_view() && t._base().is_leaf()); }

}  // namespace

Mask overwritable(const ReconstructionInputs& in, const Mask& kept, std::initializer_list<MaybeTensor> others) {
  Mask over(kept.size(), 0);
  if (!reads_first(in.likelihood)) return over;
  for (size_t k = 0; k < kept.size(); ++k) {
    const Tensor& p = in.params[k];
    over[k] = kept[k] && is_plain(p) && is_result(p) && p.sizes() == in.params[0].sizes() && disjoint(steps_of(p));
  }
  if (!any(over)) return over;
  for (size_t k = 0; k < over.size(); ++k) {
    const Tensor& p = in.params[k];
    const auto apart = [&](const MaybeTensor& t) { return !t || !t->is_alias_of(p); };
    bool alone = apart(in.target) && apart(in.weight) && std::all_of(others.begin(), others.end(), apart);
    for (size_t j = 0; j < over.size(); ++j) alone = alone && (j == k || disjoint(p, in.params[j]));
    if (over[k] && !alone) return Mask(over.size(), 0);
  }
  return over;
}

}  // namespace vaefast
