// The host's side: cuts problems into blocks, finds scratch memory, decides which launch of launches.h does it, on the
// caller's stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "cuda/launches.h"
#include "likelihoods.h"
#include "problems.h"

namespace vaefast {

// A counter that is 0 between launches, for one launch at a time on this stream.
unsigned* counter_for(const at::Tensor& on, cudaStream_t stream);

// Blocks of a rescaling.
constexpr int64_t kRescaleUnits = 1024;

// Decides how the loops reach each operand, and how they move them all. The first `full` operands are as large as the
// space where they are there at all.
template <class T>
void set_access(Space& space, size_t full, const std::vector<Operand*>& operands) {
  const int last = space.ndim - 1;
  const int64_t columns = space.size[last];
  const auto in_packs = [](int64_t n) { return n % kPack<T> == 0; };
  const auto all = [](const int64_t* begin, const int64_t* end, auto f) { return std::all_of(begin, end, f); };
  bool packed = true, plain = space.numel <= 0x7fffffff && in_packs(space.rows ? space.numel / space.rows : 0);
  const Operand* linear = nullptr;
  for (size_t k = 0; k < operands.size(); ++k) {
    Operand* op = operands[k];
    if (!op->data) {
      op->access = Access::kConstant;
      continue;
    }
    const int64_t *stride = op->stride, *outer = stride + last;
    const bool scalar = space.numel > 1 && all(stride, outer + 1, [](int64_t s) { return s == 0; });
    const bool row_scalar = !scalar && !op->linear && *outer == 0 && in_packs(columns);
    const int64_t skip = scalar || op->linear ? 0 : (stride[0] - (row_scalar ? 0 : columns)) * size_of(op->dtype);
    op->skip = uint32_t(skip);
    plain = plain && (scalar || op->linear || (last == 1 && op->skip == skip));
    space.views = space.views || !(scalar || op->linear);
    if (scalar || row_scalar) {
      op->access = scalar ? Access::kScalar : Access::kRowScalar;
      plain = plain && k >= full && op->dtype == DType::kFloat;
      continue;
    }
    op->access = op->linear ? Access::kLinear : Access::kView;
    if (!linear) linear = op;
    plain = plain && op->dtype == linear->dtype && op->dtype != DType::kBool;
    const bool aligned = reinterpret_cast<uintptr_t>(op->data) % (size_of(op->dtype) * kPack<T>) == 0;
    packed = packed && aligned && (op->linear || (*outer == 1 && in_packs(columns) && all(stride, outer, in_packs)));
  }
  if (!packed) return;
  space.moves = Moves::kPacked;
  if (!plain || !linear) return;
  space.moves = linear->dtype == DType::kFloat  ? Moves::kPlain
                : linear->dtype == DType::kHalf ? Moves::kPlainHalf
                                                : Moves::kPlainBFloat16;
  // m = 2^(32 + shift) / columns, rounded up, with 2^(shift + 1) the power of two that holds columns: exact for 31 bits
  // (Granlund & Montgomery 1994, theorem 4.2)
  while (columns > int64_t(2) << space.shift) ++space.shift;
  space.reciprocal = uint32_t(((uint64_t(1) << (32 + space.shift)) + uint64_t(columns) - 1) / uint64_t(columns));
}

template <class T>
void set_access(ReconstructionProblem& p) {
  std::vector<Operand*> operands{&p.target};
  for (Operand& param : p.param) operands.push_back(&param);
  operands.insert(operands.end(), {&p.weight, &p.upstream, &p.out_nll});
  for (Operand& grad : p.out_grad) operands.push_back(&grad);
  set_access<T>(p.space, 1 + kMaxParams, operands);
}

inline std::vector<Operand*> operands_of(PosteriorProblem& p) {
  return {&p.mu,    &p.raw,    &p.eps,     &p.dz,       &p.prior_mu,      &p.prior_logvar,     &p.dkl,
          &p.out_z, &p.out_kl, &p.out_dmu, &p.out_draw, &p.out_dprior_mu, &p.out_dprior_logvar};
}

template <class T>
void set_access(PosteriorProblem& p) {
  set_access<T>(p.space, 4, operands_of(p));
  if (p.philox.on && !p.philox.linear) {
    p.space.views = true;
    p.space.moves = Moves::kSingle;
  }
}

// Whether plain moves may be of 16 bytes whatever the dtype.
inline bool in_lines(const Space& s, std::initializer_list<const Operand*> operands) {
  if (s.numel == 0 || s.moves == Moves::kSingle || s.moves == Moves::kPacked) return false;
  const int line = s.moves == Moves::kPlain ? 4 : 8;
  if (s.numel / s.rows % line || (s.views && s.size[s.ndim - 1] % line)) return false;
  return std::all_of(operands.begin(), operands.end(), [](const Operand* op) {
    const bool moved = op->access == Access::kLinear || op->access == Access::kView;
    return !moved || (reinterpret_cast<uintptr_t>(op->data) % 16 == 0 && op->skip % 16 == 0);
  });
}

inline bool is_number(const Operand& op) { return op.access == Access::kConstant || op.access == Access::kScalar; }

inline bool is_plain(const PosteriorProblem& p) {
  const auto there = [&](const Operand& op) { return !p.backward || op.data; };
  return in_lines(p.space, {&p.mu, &p.raw, &p.dz, &p.out_z, &p.out_dmu, &p.out_draw}) && !p.prior &&
         !p.activation.clamped && !p.activation.floored && (!p.sample || p.philox.on) && !p.out_kl.data &&
         is_number(p.dkl) && there(p.out_dmu) && there(p.out_draw);
}

inline bool is_mixture(const ReconstructionProblem& p) {
  return !p.kept && visit(p.likelihood, Likelihoods{}, [](auto tag) { return kMixture<typename decltype(tag)::type>; });
}

inline bool is_plain(const ReconstructionProblem& p) {
  if (is_mixture(p) || p.weight.data || p.out_nll.data || !is_number(p.upstream)) return false;
  static_assert(kMaxParams == 4);
  return in_lines(p.space, {&p.target, &p.param[0], &p.param[1], &p.param[2], &p.param[3], &p.out_grad[0],
                            &p.out_grad[1], &p.out_grad[2], &p.out_grad[3]});
}

// Whether a plain kernel does the job: both problems, in one dtype. In backward the KL's gradients come with a
// rescaling, or with those of a reconstruction in float16, which alone leaves them to backward.
inline bool is_plain(const Job& job, const Launch& a) {
  const ReconstructionProblem& r = a.reconstruction;
  const PosteriorProblem& p = a.posterior;
  if (!job.posterior) return is_plain(r);
  if (!job.reconstruction) return is_plain(p);
  return is_plain(r) && is_plain(p) && r.space.moves == p.space.moves &&
         (!p.backward || r.kept || r.space.moves == Moves::kPlainHalf);
}

inline void launch_plain(const Launch& a, bool reconstruction, cudaStream_t stream) {
  const Moves moves = reconstruction ? a.reconstruction.space.moves : a.posterior.space.moves;
  if (moves == Moves::kPlain) return launch_plain<float>(a, reconstruction, stream);
  if (moves == Moves::kPlainHalf) return launch_plain<__half>(a, reconstruction, stream);
  launch_plain<__nv_bfloat16>(a, reconstruction, stream);
}

// How a problem is cut; raises where its units are more than can be numbered.
template <class T, class... Options>
Geometry cut(const Space& space, Options... options) {
  const Geometry g = geometry_of<T>(space, options...);
  TORCH_CHECK(g.fits() && space.rows <= 0xffffffff, "vaefast: ", space.rows,
              " rows are too many for one launch; split the batch");
  return g;
}

// Logits that one instruction moves where memory allows it: 16 bytes of a site's where classes lie next to each other;
// a class of two sites where those do, if a thread has all of a site's classes.
template <class T>
int chunk_of(const ReconstructionProblem& p) {
  if (sizeof(T) == 8 || p.channels || p.space.numel == 0) return 1;
  if (p.param_step != 1) {
    const int64_t in_pairs = (p.space.numel / p.space.rows) | p.param_step | p.grad_step;
    // sites of a row may share their logits, which lie next to no others then
    const Access access = p.param[0].access;
    const bool apart = access == Access::kLinear || access == Access::kView;
    return apart && p.space.moves != Moves::kSingle && 2 * p.planes <= kShare && in_pairs % 2 == 0 ? 2 : 1;
  }
  const Operand &from = p.param[0], &to = p.out_grad[0];
  const int line = 16 / size_of(from.dtype);
  const auto in_lines = [&](const Operand& op) {
    return reinterpret_cast<uintptr_t>(op.data) % 16 == 0 &&
           std::all_of(op.stride, op.stride + p.space.ndim, [&](int64_t s) { return s % line == 0; });
  };
  return p.planes % line == 0 && in_lines(from) && (!to.data || (p.grad_step == 1 && in_lines(to))) ? line : 1;
}

template <class T>
Geometry cut_reconstruction(ReconstructionProblem& p) {
  constexpr int each = kPack<T> * kPacksPerThread;
  // where the gradients turn out right as they are, every block has come for nothing
  if (p.kept) return cut<T>(p.space, each, kRescaleUnits);
  if (p.planes == 1) return cut<T>(p.space, least_of<T>(p.space, p.sum));
  p.chunk = chunk_of<T>(p);
  p.space.moves = Moves::kSingle;
  return p.channels ? cut<T>(p.space, 1) : cut<T>(p.space, 4, kMaxUnits, 1 << log_team_of(p));
}

template <class T>
void launch_job(const Launch& a, const Job& job, cudaStream_t stream) {
  if constexpr (sizeof(T) == 4) {
    if (is_plain(job, a)) return launch_plain(a, job.reconstruction, stream);
  }
  if (!job.reconstruction) return launch_posterior<T>(a, stream);
  const ReconstructionProblem& r = a.reconstruction;
  if (r.kept) return launch_rescale<T>(a, stream);
  if (is_mixture(r)) return launch_mixture<T>(a, stream);
  visit_group(r.likelihood, LikelihoodGroups{},
              [&](auto group, int index) { launch_reconstruction<T, decltype(group)>(index, a, stream); });
}

template <class T>
void run_one(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  Launch a;
  if (job.reconstruction) {
    a.reconstruction = *job.reconstruction;
    set_access<T>(a.reconstruction);
    a.rec = cut_reconstruction<T>(a.reconstruction);
  }
  if (job.posterior) {
    a.posterior = *job.posterior;
    set_access<T>(a.posterior);
    a.post = cut<T>(a.posterior.space, least_of<T>(a.posterior.space, a.posterior.sum));
  }
  a.total = job.total;
  a.beta = job.beta;
  const auto adds_up = [](const Sum& sum, const Geometry& g) { return sum.out && g.per_row != 1; };
  Sum &rec = a.reconstruction.sum, &post = a.posterior.sum;
  at::Tensor partial;
  bool apart = false;
  if (a.total || adds_up(rec, a.rec) || adds_up(post, a.post)) {
    partial = at::empty({int64_t(a.rec.count) + a.post.count}, on.options().dtype(at::kDouble));
    rec.partial = partial.mutable_data_ptr<double>();
    post.partial = rec.partial + a.rec.count;
    const int64_t rows = job.posterior ? a.posterior.space.rows : a.reconstruction.space.rows;
    a.rows = uint32_t(rows);
    apart = rows > kRowsOfOneBlock;
    if (!apart) {
      a.counter = counter_for(on, stream);
      // a sum over nothing is a block's work too
      if (a.rec.blocks + a.post.blocks == 0) (job.reconstruction ? a.rec : a.post).blocks = 1;
    }
  }
  if (a.rec.blocks + a.post.blocks > 0) launch_job<T>(a, job, stream);
  if (apart) launch_finish<T>(a, stream);
}

// Whether two posteriors fit into one launch: the kernel goes by what it reads of the first alone.
inline bool alike(PosteriorProblem& a, PosteriorProblem& b) {
  if (a.space.views || b.space.views || a.space.moves != b.space.moves) return false;
  const auto as = operands_of(a), bs = operands_of(b);
  return std::equal(as.begin(), as.end(), bs.begin(), [](const Operand* x, const Operand* y) {
    return x->access == y->access && (x->access == Access::kConstant || x->dtype == y->dtype);
  });
}

// As many launches as there are kinds of posteriors in the list: one, for whole packs of contiguous tensors of one
// dtype. Each leaves its units' sums; the last adds all of them up, in the list's order.
template <class T>
void run_list(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  std::vector<Listed> listed(job.posteriors);
  std::vector<std::vector<int64_t>> launches;
  uint32_t partials = 0;
  for (int64_t k = 0; k < job.posteriors; ++k) {
    PosteriorProblem& p = job.posterior[k];
    set_access<T>(p);
    const auto operands = operands_of(p);
    for (size_t i = 0; i < operands.size(); ++i) {
      operands[i]->number = uint8_t(i);
      listed[k].data[i] = operands[i]->data;
    }
    listed[k].cut = cut<T>(p.space, least_of<T>(p.space, p.sum));
    listed[k].first_partial = std::exchange(partials, partials + listed[k].cut.per_row);
    if (listed[k].cut.blocks == 0 && !p.sum.out) continue;
    const auto fits = [&](const std::vector<int64_t>& ks) {
      return ks.size() < kListed && alike(job.posterior[ks[0]], p);
    };
    const auto found = std::find_if(launches.begin(), launches.end(), fits);
    (found == launches.end() ? launches.emplace_back() : *found).push_back(k);
  }
  at::Tensor partial;
  Launch last;
  const bool apart = job.posterior->sum.out && job.posterior->space.rows > kRowsOfOneBlock;
  for (const auto& ks : launches) {
    ListLaunch a;
    a.posterior = job.posterior[ks[0]];
    int64_t blocks = 0;
    for (int64_t k : ks) {
      Listed& one = a.list[a.count++] = listed[k];
      one.first_block = uint32_t(std::exchange(blocks, blocks + one.cut.blocks));
      const Philox &own = job.posterior[k].philox, &first = a.posterior.philox;
      one.skipped = (own.offset_add - first.offset_add) >> own.offset_shift;
      if (own.save) a.posterior.philox.save = own.save;
    }
    if (Sum& sum = a.posterior.sum; sum.out) {
      // a row of one partial sum would be taken for finished
      a.sums.per_row = std::max(partials, 2u);
      if (!partial.defined()) {
        const auto options = on.options().dtype(at::kDouble);
        const int64_t size = a.posterior.space.rows * a.sums.per_row;
        partial = partials < 2 ? at::zeros({size}, options) : at::empty({size}, options);
      }
      sum.partial = partial.mutable_data_ptr<double>();
      if (&ks == &launches.back() && !apart) a.counter = counter_for(on, stream);
      blocks = std::max<int64_t>(blocks, 1);
      last.posterior.sum = sum;
      last.post = a.sums;
      last.rows = uint32_t(a.posterior.space.rows);
    }
    launch_list<T>(a, blocks, stream);
  }
  if (apart) launch_finish<T>(last, stream);
}

template <class T>
void run_typed(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  job.posteriors > 1 ? run_list<T>(on, job, stream) : run_one<T>(on, job, stream);
}

inline void run_on(const at::Tensor& on, const Job& job, cudaStream_t stream) {
  const bool wide = job.posterior ? job.posterior->wide : job.reconstruction->wide;
  wide ? run_typed<double>(on, job, stream) : run_typed<float>(on, job, stream);
}

}  // namespace vaefast
