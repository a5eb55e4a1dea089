// The CPU back end: picks the instruction set, spreads units over threads, and adds the partial sums in a fixed order.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/kernels.h"
#include "device.h"

namespace vaefast {

namespace {

// Elements a thread should have before a second one is worth waking.
constexpr int64_t kGrain = 12288;

const CpuKernels& kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    const std::string isa = at::get_cpu_capability();  // honours ATEN_CPU_CAPABILITY
#if defined(VAEFAST_HAVE_AVX512)
    if (isa.rfind("AVX512", 0) == 0) return cpu_kernels_AVX512();
#endif
#if defined(VAEFAST_HAVE_AVX2)
    if (isa.rfind("AVX", 0) == 0) return cpu_kernels_AVX2();
#endif
#if defined(VAEFAST_HAVE_DEFAULT)
    return cpu_kernels_DEFAULT();
#else
    TORCH_CHECK(false, "vaefast was compiled for other machines than this, which runs ", isa);
#endif
  }();
  return chosen;
}

struct Units {
  int64_t per_row = 0, count = 0, cost = 0;  // cost of a unit, in elements

  Units() = default;
  explicit Units(const Space& s, int planes = 1) {
    const int64_t cols = s.rows ? s.numel / s.rows : 0, unit = unit_of(planes);
    per_row = (cols + unit - 1) / unit;
    count = per_row * s.rows;
    cost = per_row ? (cols + per_row - 1) / per_row * planes : 0;
  }

  int64_t total() const { return count * cost; }

  // The units whose middle lies within elements [begin, end) of this task's share.
  template <class F>
  void within(int64_t begin, int64_t end, F f) const {
    if (cost == 0) return;
    const int64_t first = std::max<int64_t>(0, (begin + cost / 2) / cost);
    const int64_t last = std::min(count, (end + cost / 2) / cost);
    if (first < last) f(first, last);
  }
};

// out[row] = scale * the row's partial sums of all problems, which share the rows.
template <class T, class Problem>
void finish_rows(const Problem* problems, const Units* units, int64_t count) {
  const Sum& first = problems->sum;
  if (!first.out) return;
  for (int64_t row = 0; row < problems->space.rows; ++row) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double* partial = problems[i].sum.partial + row * units[i].per_row;
      for (int64_t k = 0; k < units[i].per_row; ++k) total += partial[k];
    }
    static_cast<T*>(first.out)[row] = T(first.scale * total);
  }
}

template <class T>
void finish(const Job& job, const Units& rec, const Units* post) {
  if (job.reconstruction) finish_rows<T>(job.reconstruction, &rec, 1);
  if (job.posterior) finish_rows<T>(job.posterior, post, job.posteriors);
  if (!job.total) return;
  const T* nll = static_cast<const T*>(job.reconstruction->sum.out);
  const T* kl = static_cast<const T*>(job.posterior->sum.out);
  for (int64_t row = 0; row < job.posterior->space.rows; ++row) {
    static_cast<T*>(job.total)[row] = T(double(nll[row]) + job.beta * double(kl[row]));
  }
}

#if defined(__linux__)
// Fresh memory of this size comes straight from the kernel, which hands it over 4 KB at a time: a third of the time of
// a large sample. Asked beforehand, it takes 2 MB at a time.
constexpr uintptr_t kHugePage = 1 << 21;

void use_huge_pages(const void* data, int64_t bytes) {
  if (!data) return;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last && last - first >= 2 * kHugePage) {
    // where it is refused nothing changes
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
}

void use_huge_pages(const Operand& out, const Space& space, int64_t between_planes = 0) {
  if (!out.data || space.numel == 0) return;
  const int64_t size = out.dtype == DType::kDouble ? 8 : out.dtype == DType::kFloat ? 4 : 2;
  int64_t last_element =
      between_planes;  // of a half of a larger result, what lies between its rows is the other half's
  for (int d = 0; d < space.ndim; ++d) last_element += (space.size[d] - 1) * out.stride[d];
  use_huge_pages(out.data, (last_element + 1) * size);
}
#else
void use_huge_pages(const void*, int64_t) {}
void use_huge_pages(const Operand&, const Space&, int64_t = 0) {}
#endif

void prepare_outputs(const Job& job) {
  for (int64_t i = 0; job.posterior && i < job.posteriors; ++i) {
    const PosteriorProblem& p = job.posterior[i];
    for (const Operand* out : {&p.out_z, &p.out_kl, &p.out_dmu, &p.out_draw, &p.out_dprior_mu, &p.out_dprior_logvar}) {
      use_huge_pages(*out, p.space);
    }
  }
  if (const ReconstructionProblem* r = job.reconstruction; r && !r->kept) {
    use_huge_pages(r->out_nll, r->space);
    for (const Operand& out : r->out_grad) use_huge_pages(out, r->space, (r->planes - 1) * r->grad_step);
  }
}

// While one lives, its thread takes subnormal numbers for 0. Weights of several draws, e^x with x down to -100, make
// such of the gradients that they multiply, and each would take some hundred cycles.
class Flushed {
 public:
  explicit Flushed(bool wanted) : changed_(wanted && !flushes() && at::Context::setFlushDenormal(true)) {}
  ~Flushed() {
    if (changed_) at::Context::setFlushDenormal(false);
  }
  Flushed(const Flushed&) = delete;
  Flushed& operator=(const Flushed&) = delete;

 private:
  static bool flushes() {
    const volatile float least = std::numeric_limits<float>::min();
    return least * 0.5f == 0;
  }

  bool changed_;
};

void run_on_cpu(const at::Tensor&, Job& job) {
  const CpuKernels& k = kernels();
  prepare_outputs(job);
  const bool wide = job.posterior ? job.posterior->wide : job.reconstruction->wide;
  ReconstructionProblem* r = job.reconstruction;
  const Units rec = r ? Units(r->space, r->planes) : Units();
  c10::SmallVector<Units, 1> post;
  int64_t count = rec.count, total = rec.total();
  for (int64_t i = 0; job.posterior && i < job.posteriors; ++i) {
    post.emplace_back(job.posterior[i].space);
    count += post[i].count;
    total += post[i].total();
  }
  std::vector<double> partial(count);
  double* next = partial.data() + rec.count;
  if (r) r->sum.partial = partial.data();
  for (size_t i = 0; i < post.size(); next += post[i++].count) job.posterior[i].sum.partial = next;
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    rec.within(begin, end, [&](int64_t a, int64_t b) {
      const Flushed flushed(r->kept);
      k.reconstruction(*r, a, b);
    });
    int64_t before = rec.total();
    for (size_t i = 0; i < post.size() && before < end; before += post[i++].total()) {
      post[i].within(begin - before, end - before, [&](int64_t a, int64_t b) { k.posterior(job.posterior[i], a, b); });
    }
  });
  wide ? finish<double>(job, rec, post.data()) : finish<float>(job, rec, post.data());
}

void philox(const c10::optional<at::Generator>& generator, int64_t, const at::Tensor& save, Philox& philox) {
  auto* cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  uint64_t word;
  {
    std::lock_guard<std::mutex> lock(cpu->mutex_);
    word = cpu->random64();
  }
  int64_t* seed = save.mutable_data_ptr<int64_t>();
  seed[0] = int64_t(word ^ (uint64_t(1) << 63));  // torch.randint's way over all of int64, so that the reference agrees
  seed[1] = 0;
  philox.seed = seed;
  philox.offset = seed + 1;
}

// The tasks are fixed by the sizes alone, and each writes what no other does.
void marginals(const at::Tensor&, const MarginalsProblem& p) {
  const int64_t pairs = p.batch * ((p.batch + p.chunks - 1) / p.chunks);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, pairs));
  at::parallel_for(0, p.latents * p.chunks, grain,
                   [&](int64_t begin, int64_t end) { kernels().marginals(p, begin, end); });
}

// A row's sites, in a few chains, whose order is fixed by the sizes alone.
template <class T>
void add_up(const CategoricalProblem& p) {
  constexpr int kChains = 4;
  const int64_t rows = p.space.rows, cols = rows ? p.space.numel / rows : 0;
  const T* each = static_cast<const T*>(p.each);
  for (int64_t row = 0; row < rows; ++row, each += cols) {
    double sums[kChains] = {};
    for (int64_t i = 0; i < cols; ++i) sums[i % kChains] += double(each[i]);
    static_cast<T*>(p.sum.out)[row] = T(p.sum.scale * ((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
}

void categorical(const at::Tensor&, const CategoricalProblem& p) {
  const int64_t others = p.classes - 1;
  use_huge_pages(p.out_z, p.space, others * p.out_z_step);
  use_huge_pages(p.out_dlogits, p.space, others * p.out_dlogits_step);
  use_huge_pages(p.out_dprior, p.space, others * p.out_dprior_step);
  const int64_t grain = std::max<int64_t>(1, kGrain / 4 / p.classes);
  at::parallel_for(0, p.space.numel, grain, [&](int64_t begin, int64_t end) { kernels().categorical(p, begin, end); });
  if (p.sum.out) p.wide ? add_up<double>(p) : add_up<float>(p);
}

void log_ratio(const at::Tensor&, const LogRatioProblem& p) {
  const int64_t numbers = p.samples * p.latents;
  const int64_t tasks = p.backward ? (numbers + kColumns - 1) / kColumns : p.draws * p.samples;
  const int64_t cost = std::max<int64_t>(1, p.backward ? p.draws * kColumns : p.latents);
  at::parallel_for(0, tasks, std::max<int64_t>(1, kGrain / cost),
                   [&](int64_t begin, int64_t end) { kernels().log_ratio(p, begin, end); });
}

void experts(const at::Tensor&, const ExpertsProblem& p) {
  const int64_t bytes = p.columns * (p.wide ? 8 : 4);
  for (void* out : {p.mu, p.logvar}) use_huge_pages(out, bytes);
  for (void* out : {p.dmus, p.dlogvars}) use_huge_pages(out, p.experts * bytes);
  const int64_t stretches = (p.columns + kStretch - 1) / kStretch;
  at::parallel_for(0, stretches, std::max<int64_t>(1, kGrain / (p.experts * kStretch)),
                   [&](int64_t begin, int64_t end) { kernels().experts(p, begin, end); });
}

// A mixture's gradients but for the samples', of what its chunks have added up.
template <class T>
void collect(const MixtureProblem& p, const MixtureChunks& chunks) {
  const int64_t numbers = p.components * p.latents;
  const auto sum = [&](int64_t i) {
    double found = 0;
    for (int64_t c = 0; c < chunks.count; ++c) found += chunks.scratch[c * chunks.each + i];
    return found;
  };
  for (int64_t i = 0; i < numbers; ++i) {
    static_cast<T*>(p.dmus)[i] = T(sum(i));
    static_cast<T*>(p.dlogvars)[i] = T(sum(numbers + i));
  }
  if (!p.dlogits) return;
  const T* logits = static_cast<const T*>(p.logits);
  const double most = double(*std::max_element(logits, logits + p.components));
  double total = 0, weights = 0;
  for (int64_t k = 0; k < p.components; ++k) {
    total += sum(2 * numbers + k);
    weights += std::exp(double(logits[k]) - most);
  }
  for (int64_t k = 0; k < p.components; ++k) {
    const double weight = std::exp(double(logits[k]) - most) / weights;
    static_cast<T*>(p.dlogits)[k] = T(sum(2 * numbers + k) - total * weight);
  }
}

void mixture(const at::Tensor&, const MixtureProblem& p) {
  // differences that a chunk should have, how many there may be, and how many samples lie in a cache beside what is
  // computed of them
  constexpr int64_t kWorth = 1 << 14, kMost = 8, kResident = 128, lanes = MixtureChunks::kSampleLanes;
  const int64_t differences = p.samples * p.components * std::max<int64_t>(1, p.latents);
  const int64_t count = std::clamp<int64_t>(std::min(differences / kWorth, p.samples / kResident), 1, kMost);
  MixtureChunks chunks(p, count, std::min(kResident, (p.samples + lanes - 1) / lanes * lanes));
  const std::unique_ptr<double[]> scratch(new double[count * chunks.each]);
  chunks.scratch = scratch.get();
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { kernels().mixture(p, chunks, begin, end); });
  if (p.backward) p.wide ? collect<double>(p, chunks) : collect<float>(p, chunks);
}

void ivon(const IvonProblem* problems, int64_t count) {
  std::vector<int64_t> starts(count + 1);  // of each problem's units
  for (int64_t k = 0; k < count; ++k) {
    const IvonProblem& p = problems[k];
    for (void* out : {p.mean, p.noise}) use_huge_pages(out, p.numel * (p.wide ? 8 : 4));
    starts[k + 1] = starts[k] + (p.numel + kWeights - 1) / kWeights;
  }
  at::parallel_for(0, starts[count], kGrain / kWeights, [&](int64_t begin, int64_t end) {
    int64_t k = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; k < count && starts[k] < end; ++k) {
      kernels().ivon(problems[k], std::max(begin, starts[k]) - starts[k], std::min(end, starts[k + 1]) - starts[k]);
    }
  });
}

// A bound's rows, the draws of each sample: their losses, and the weights that follow when all of a sample's are known.
class BoundRows {
 public:
  explicit BoundRows(const BoundProblem& p)
      : p_(p),
        losses_(p.reconstruction->space, p.reconstruction->planes),
        gradients_(p.rescale ? Units(p.rescale->space) : Units()),
        partial_(losses_.count),
        bounds_(p.samples) {
    p.reconstruction->sum.partial = partial_.data();
  }

  int64_t count() const { return p_.draws * p_.samples; }
  // of one row, in elements
  int64_t cost() const { return std::max<int64_t>(1, losses_.per_row * losses_.cost); }

  void lose(int64_t row) { kernels().reconstruction(*p_.reconstruction, row * losses_.per_row, end(losses_, row)); }

  void weigh(int64_t sample) { p_.wide ? weigh<double>(sample) : weigh<float>(sample); }

  void rescale(int64_t row) {
    if (!p_.rescale) return;
    kernels().reconstruction(*p_.rescale, row * gradients_.per_row, end(gradients_, row));
  }

  void finish() const { p_.wide ? finish<double>() : finish<float>(); }

 private:
  static int64_t end(const Units& units, int64_t row) { return (row + 1) * units.per_row; }

  double ratio(int64_t row) const {
    return p_.ratio_wide ? static_cast<const double*>(p_.ratio)[row] : double(static_cast<const float*>(p_.ratio)[row]);
  }

  template <class T>
  void weigh(int64_t sample) {
    T *log_weights = static_cast<T*>(p_.log_weights), *share = static_cast<T*>(p_.share);
    c10::SmallVector<double, 64> w(p_.draws);
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t k = 0; k < p_.draws; ++k) {
      const int64_t row = k * p_.samples + sample;
      double loss = 0;
      for (int64_t u = row * losses_.per_row; u < end(losses_, row); ++u) loss += partial_[u];
      w[k] = ratio(row) - loss;
      log_weights[row] = T(w[k]);
      most = std::max(most, w[k]);
    }
    if (std::isinf(most)) most = 0;
    for (double& each : w) sum += each = std::exp(each - most);
    bounds_[sample] = std::log(double(p_.draws)) - (std::log(sum) + most);
    for (int64_t k = 0; share && k < p_.draws; ++k) share[k * p_.samples + sample] = T(p_.scale * (w[k] / sum));
  }

  template <class T>
  void finish() const {
    T* loss = static_cast<T*>(p_.loss);
    double sum = 0;
    for (int64_t b = 0; b < p_.samples; ++b) {
      if (p_.sum) {
        sum += bounds_[b];
      } else {
        loss[b] = T(p_.scale * bounds_[b]);
      }
    }
    if (p_.sum) *loss = T(p_.scale * sum);
  }

  const BoundProblem& p_;
  const Units losses_, gradients_;
  std::vector<double> partial_, bounds_;
};

// Sample by sample, so that a sample's gradients are multiplied by their weights while they lie in a cache; where there
// are too few samples for the threads, step by step. Either way each number comes of the same operations.
void bound(const BoundProblem& p) {
  Job job;
  job.reconstruction = p.reconstruction;
  prepare_outputs(job);
  BoundRows rows(p);
  const auto grain = [](int64_t cost) { return std::max<int64_t>(1, kGrain / cost); };
  const int64_t threads = at::get_num_threads();
  if (p.samples >= 4 * threads || threads == 1) {
    at::parallel_for(0, p.samples, grain(p.draws * rows.cost()), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t k = 0; k < p.draws; ++k) rows.lose(k * p.samples + b);
        rows.weigh(b);
        const Flushed flushed(true);
        for (int64_t k = 0; k < p.draws; ++k) rows.rescale(k * p.samples + b);
      }
    });
  } else {
    at::parallel_for(0, rows.count(), grain(rows.cost()), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) rows.lose(row);
    });
    for (int64_t b = 0; b < p.samples; ++b) rows.weigh(b);
    at::parallel_for(0, rows.count(), grain(rows.cost()), [&](int64_t begin, int64_t end) {
      const Flushed flushed(true);
      for (int64_t row = begin; row < end; ++row) rows.rescale(row);
    });
  }
  rows.finish();
}

const bool registered = [] {
  device_for(c10::DeviceType::CPU) = {run_on_cpu,  philox,    true,    true,    nullptr, marginals,
                                      categorical, log_ratio, experts, mixture, bound,   ivon};
  return true;
}();

}  // namespace

}  // namespace vaefast
