#include "autograd/batched.h"

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <vector>

namespace vaefast {

namespace {

using at::Tensor;
using torch::jit::Stack;

// f of every tensor in an argument or a result, which is put in its place.
template <class F>
c10::IValue map(const c10::IValue& value, const F& f) {
  if (value.isTensor() && value.toTensor().defined()) return f(value.toTensor());
  if (!value.isTensorList()) return value;
  std::vector<Tensor> list = value.toTensorVector();
  for (Tensor& t : list) t = f(t);
  return list;
}

// The innermost batch of a vmap among some arguments, and how many are in it.
struct Batch {
  int64_t level = -1, size = 0;

  explicit Batch(at::ArrayRef<c10::IValue> args) {
    for (const c10::IValue& arg : args) {
      map(arg, [&](const Tensor& t) {
        if (const auto* impl = at::maybeGetBatchedImpl(t); impl && impl->bdims().back().level() > level) {
          level = impl->bdims().back().level();
          size = impl->value().size(impl->bdims().back().dim());
        }
        return t;
      });
    }
  }

  bool has(const Tensor& t) const {
    const auto* impl = at::maybeGetBatchedImpl(t);
    return impl && impl->bdims().back().level() == level;
  }

  // Number k of the batch, where t is one; what it is in the batches around this one it stays.
  Tensor at(const Tensor& t, int64_t k) const {
    if (!has(t)) return t;
    const auto* impl = at::unsafeGetBatchedImpl(t);
    const int64_t dim = impl->bdims().back().dim();
    at::BatchDims outer;
    for (const at::BatchDim& b : impl->bdims().slice(0, impl->bdims().size() - 1))
      outer.emplace_back(b.level(), b.dim() - (b.dim() > dim));
    const Tensor one = impl->value().select(dim, k);
    return outer.empty() ? one : at::makeBatched(one, outer);
  }
};

// All calls' results number r.
c10::IValue side_by_side(const std::vector<Stack>& results, size_t r, const Batch& batch) {
  const auto put = [&](const std::vector<Tensor>& each) { return at::addBatchDim(at::stack(each), batch.level, 0); };
  std::vector<Tensor> each;
  if (results[0][r].isTensor()) {
    for (const Stack& result : results) each.push_back(result[r].toTensor());
    return put(each);
  }
  std::vector<Tensor> list;
  for (size_t k = 0; k < results[0][r].toTensorVector().size(); ++k) {
    each.clear();
    for (const Stack& result : results) each.push_back(result[r].toTensorVector()[k]);
    list.push_back(put(each));
  }
  return list;
}

}  // namespace

void one_by_one(const c10::OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const Stack args = torch::jit::pop(*stack, arguments.size());
  const Batch batch(args);
  TORCH_CHECK(batch.size > 0, op.schema().name(), " under vmap: the batch is empty");
  for (size_t k = 0; k < args.size(); ++k) {
    if (!arguments[k].alias_info() || !arguments[k].alias_info()->isWrite()) continue;
    map(args[k], [&](const Tensor& t) {
      TORCH_CHECK(batch.has(t), op.schema().name(), " under vmap: it writes over ", arguments[k].name(),
                  ", which is one tensor for a batch of results");
      return t;
    });
  }
  std::vector<Stack> results;
  for (int64_t k = 0; k < batch.size; ++k) {
    Stack& own = results.emplace_back();
    for (const c10::IValue& arg : args) own.push_back(map(arg, [&](const Tensor& t) { return batch.at(t, k); }));
    op.callBoxed(&own);
  }
  for (size_t r = 0; r < results[0].size(); ++r) stack->push_back(side_by_side(results, r, batch));
}

}  // namespace vaefast
