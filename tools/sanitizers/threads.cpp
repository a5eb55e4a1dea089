// The kernels on many threads at once, for ThreadSanitizer: each unit of a shared problem is some thread's, as
// cpu/launch.cpp deals them out, and threads with problems of their own read the same inputs, as Python's threads do.
// Results must be those of one thread, bit for bit. --race deals every unit twice, which the sanitizer must report.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace vaefast;

namespace {

constexpr int kThreads = 16, kRounds = 3;
constexpr int64_t kRows = 24, kCols = 5000, kLatents = 40, kBatch = 96, kChunks = 4;

Space rows_and_columns() {
  Space s;
  s.ndim = 2;
  s.size[0] = kRows;
  s.size[1] = kCols;
  s.numel = kRows * kCols;
  s.rows = kRows;
  return s;
}

int64_t units(const Space& s) { return s.rows * ((s.numel / s.rows + kUnit - 1) / kUnit); }

template <class T>
Operand over(std::vector<T>& data) {
  Operand o;
  o.data = data.data();
  o.stride[0] = kCols;
  o.stride[1] = 1;
  o.dtype = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  o.linear = true;
  return o;
}

template <class T>
std::vector<T> numbers(int64_t n, double scale) {
  std::vector<T> found(n);
  for (int64_t i = 0; i < n; ++i) found[i] = T(scale * std::sin(0.37 * double(i) + 1));
  return found;
}

// Runs [0, count) by stretches on all threads; every other thread takes every other stretch.
void deal(int64_t count, int threads, bool twice, const std::function<void(int64_t, int64_t)>& run) {
  std::vector<std::thread> pool;
  const int64_t each = 3;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (int64_t begin = each * t; begin < count; begin += each * threads) run(begin, std::min(count, begin + each));
      if (twice) run(0, count);
    });
  }
  for (auto& t : pool) t.join();
}

// Everything that a case writes, so that two runs can be held against each other.
struct Case {
  std::vector<std::vector<unsigned char>> written;

  template <class T>
  void keep(const std::vector<T>& data) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    written.emplace_back(bytes, bytes + data.size() * sizeof(T));
  }
};

template <class T>
struct Inputs {
  std::vector<T> mu = numbers<T>(kRows * kCols, 1), raw = numbers<T>(kRows * kCols, 0.7),
                 target = numbers<T>(kRows * kCols, 0.2), dz = numbers<T>(kRows * kCols, 0.9);
  int64_t seed[2] = {0x123456789abcdef, 77};
};

template <class T>
Case posterior(const CpuKernels& k, Inputs<T>& in, bool backward, int threads, bool race) {
  std::vector<T> first(kRows * kCols), second(kRows * kCols);
  std::vector<double> partial(1024);
  PosteriorProblem p;
  p.space = rows_and_columns();
  p.wide = sizeof(T) == 8;
  p.sample = p.kl = true;
  p.backward = backward;
  p.mu = over(in.mu);
  p.raw = over(in.raw);
  p.philox.on = p.philox.linear = true;
  p.philox.seed = in.seed;
  p.philox.offset = in.seed + 1;
  p.philox.stride[0] = kCols;
  p.philox.stride[1] = 1;
  if (backward) {
    p.dz = over(in.dz);
    p.dkl.value = 0.5;
    p.out_dmu = over(first);
    p.out_draw = over(second);
  } else {
    p.out_z = over(first);
    p.sum.partial = partial.data();
    p.sum.out = second.data();
  }
  deal(units(p.space), threads, race, [&](int64_t a, int64_t b) { k.posterior(p, a, b); });
  Case found;
  found.keep(first);
  found.keep(second);
  found.keep(partial);
  return found;
}

template <class T>
Case reconstruction(const CpuKernels& k, Inputs<T>& in, int likelihood, int params, int threads, bool race) {
  std::vector<T> grads[2] = {std::vector<T>(kRows * kCols), std::vector<T>(kRows * kCols)};
  std::vector<double> partial(1024);
  ReconstructionProblem p;
  p.space = rows_and_columns();
  p.wide = sizeof(T) == 8;
  p.likelihood = likelihood;
  p.nparams = params;
  p.nll = p.grad = true;
  p.options[0] = 1.0;
  p.param[0] = over(in.mu);
  p.param[1] = over(in.raw);
  p.target = over(in.target);
  for (int j = 0; j < params; ++j) p.out_grad[j] = over(grads[j]);
  p.sum.partial = partial.data();
  p.sum.out = grads[0].data();
  deal(units(p.space), threads, race, [&](int64_t a, int64_t b) { k.reconstruction(p, a, b); });
  Case found;
  for (const auto& g : grads) found.keep(g);
  found.keep(partial);
  return found;
}

template <class T>
Case marginals(const CpuKernels& k, bool backward, int threads, bool race) {
  const int64_t n = kLatents * kBatch;
  auto z = numbers<T>(n, 1), mu = numbers<T>(n, 0.9), slope = numbers<T>(n, 0.1), constant = numbers<T>(n, 0.3),
       g = numbers<T>(kBatch, 1);
  for (auto& s : slope) s += 1;
  std::vector<T> out(n, T(1)), dz(n), dmu(kChunks * n), dlogvar(kChunks * n);
  MarginalsProblem p;
  p.latents = kLatents;
  p.batch = kBatch;
  p.wide = sizeof(T) == 8;
  p.backward = backward;
  p.z = z.data();
  p.mu = mu.data();
  p.slope = slope.data();
  p.constant = constant.data();
  p.marginals = out.data();
  p.g = g.data();
  p.dz = dz.data();
  p.dmu = dmu.data();
  p.dlogvar = dlogvar.data();
  p.chunks = kChunks;
  deal(p.latents * p.chunks, threads, race, [&](int64_t a, int64_t b) { k.marginals(p, a, b); });
  Case found;
  for (const auto* written : {&out, &dz, &dmu, &dlogvar}) found.keep(*written);
  return found;
}

int wrong = 0;

// One problem over all threads, and then one of its own for each, over the same inputs.
void check(const char* name, const std::function<Case(int threads, bool race)>& run, bool race) {
  const Case alone = run(1, false);
  for (int round = 0; round < kRounds; ++round) wrong += run(kThreads, race).written != alone.written;
  std::vector<Case> found(kThreads);
  std::vector<std::thread> pool;
  for (auto& each : found) pool.emplace_back([&run, &each] { each = run(1, false); });
  for (auto& t : pool) t.join();
  for (const auto& each : found) wrong += each.written != alone.written;
  std::printf("%s: %d rounds on %d threads, %d differ\n", name, kRounds + 1, kThreads, wrong);
}

template <class T>
void all(const CpuKernels& k, const std::string& type, bool race) {
  Inputs<T> in;
  for (bool backward : {false, true}) {
    check(((backward ? "posterior, backward, " : "posterior, ") + type).c_str(),
          [&](int n, bool r) { return posterior(k, in, backward, n, r); }, race);
    check(((backward ? "marginals, backward, " : "marginals, ") + type).c_str(),
          [&](int n, bool r) { return marginals<T>(k, backward, n, r); }, race);
  }
  for (int likelihood = 0; likelihood < 4; ++likelihood) {
    check(("likelihood " + std::to_string(likelihood) + ", " + type).c_str(),
          [&](int n, bool r) { return reconstruction(k, in, likelihood, likelihood < 3 ? 1 : 2, n, r); }, race);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool race = argc > 1 && std::string(argv[1]) == "--race";
  const CpuKernels& k = cpu_kernels_DEFAULT();
  all<float>(k, "float", race);
  all<double>(k, "double", race);
  return wrong ? 1 : 0;
}
