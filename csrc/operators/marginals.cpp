// The marginals of a batch's aggregate posterior, and their gradients.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "device.h"
#include "operators/operators.h"
#include "operators/outputs.h"

namespace vaefast {

namespace {

// Samples that a task should have, and how many tasks there may be for a latent: each keeps sums of its own.
constexpr int64_t kSamples = 256, kChunks = 8;

const void* data_of(const Tensor& t, const Tensor& like, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(
      t.sizes() == sizes && t.is_contiguous() && t.scalar_type() == like.scalar_type() && t.device() == like.device(),
      "vaefast: the marginals take contiguous tensors of one dtype and device, got ", t.sizes(), " of ",
      t.scalar_type(), " for ", sizes);
  return t.const_data_ptr();
}

MarginalsProblem problem_of(const MarginalsInputs& in) {
  const Tensor& z = in.z;
  TORCH_CHECK_VALUE(z.dim() == 2 && (is_double(z) || z.scalar_type() == at::kFloat),
                    "vaefast: the marginals take z [D, B] of float32 or float64, got ", z.sizes());
  MarginalsProblem p;
  p.latents = z.size(0), p.batch = z.size(1);
  p.wide = is_double(z);
  p.z = data_of(z, z, z.sizes());
  p.mu = data_of(in.mu, z, z.sizes());
  p.slope = data_of(in.slope, z, z.sizes());
  p.constant = data_of(in.constant, z, z.sizes());
  TORCH_CHECK_VALUE(in.columns.size() == in.logs.size() && (in.columns.empty() || in.columns.size() == 2),
                    "vaefast: the marginals take no columns or two");
  for (size_t k = 0; k < in.columns.size(); ++k) {
    p.column[k] = data_of(in.columns[k], z, {p.batch});
    p.log[k] = data_of(in.logs[k], z, {p.batch});
  }
  return p;
}

void run(const Tensor& on, const MarginalsProblem& p) {
  if (p.latents && p.batch) vaefast::run(on, p, &Device::marginals, "the marginals");
}

}  // namespace

Tensor marginals_forward(const MarginalsInputs& in) {
  Tensor out = at::empty_like(in.z);
  if (no_compute(in.z)) return out;
  MarginalsProblem p = problem_of(in);
  p.marginals = out.mutable_data_ptr();
  p.chunks = std::max<int64_t>(1, (p.batch + kSamples - 1) / kSamples);
  run(in.z, p);
  return out;
}

Tensors marginals_backward(const Tensor& g, const Tensor& marginals, const MarginalsInputs& in) {
  Tensor dz = at::empty_like(in.z);
  if (no_compute(in.z)) return {dz, at::empty_like(in.z), at::empty_like(in.z)};
  MarginalsProblem p = problem_of(in);
  p.backward = true;
  p.marginals = const_cast<void*>(data_of(marginals, in.z, in.z.sizes()));
  p.g = data_of(g, in.z, {p.batch});
  p.dz = dz.mutable_data_ptr();
  p.chunks = std::min(kChunks, std::max<int64_t>(1, (p.batch + kSamples - 1) / kSamples));
  const Tensor sums = at::zeros({2, p.chunks, p.latents, p.batch}, in.z.options());
  p.dmu = sums[0].mutable_data_ptr();
  p.dlogvar = sums[1].mutable_data_ptr();
  run(in.z, p);
  return {dz, sums[0].sum(0), sums[1].sum(0)};
}

}  // namespace vaefast
