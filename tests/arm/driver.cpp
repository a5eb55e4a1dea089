// Solves the problems that a file describes with the kernels of the instruction set that this was compiled for, and
// writes the results to another: what is run on a machine, or an emulator, that has no PyTorch.
//
//   driver <problems> <results>
//
// Everything is contiguous, and numbers are int64 or double; arm/run.py writes them, in the order in which they are
// read here.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

using namespace vaefast;

namespace {

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (!file_) std::exit(2);
  }
  ~File() { std::fclose(file_); }

  bool more() {
    const int c = std::getc(file_);
    return c != EOF && std::ungetc(c, file_) != EOF;
  }
  template <class T>
  T get() {
    T x;
    read(&x, sizeof(T));
    return x;
  }
  int64_t whole() { return get<int64_t>(); }
  double number() { return get<double>(); }
  std::vector<char> bytes(int64_t n) {
    std::vector<char> data(n);
    read(data.data(), n);
    return data;
  }
  template <class T>
  void write(const std::vector<T>& data) {
    if (std::fwrite(data.data(), sizeof(T), data.size(), file_) != data.size()) std::exit(4);
  }

 private:
  void read(void* to, size_t n) {
    if (std::fread(to, 1, n, file_) != n) std::exit(3);
  }
  FILE* file_;
};

int64_t size_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

// Tensors of [rows, planes, cols], each with as many planes as it has.
class Arrays {
 public:
  Arrays(DType dtype, int64_t rows, int64_t cols) : dtype_(dtype), rows_(rows), cols_(cols) {}

  void read(File& in, Operand& operand, int64_t planes = 1) { add(operand, planes, in.bytes(bytes(planes))); }
  void output(Operand& operand, int64_t planes = 1) {
    add(operand, planes, std::vector<char>(bytes(planes)));
    outputs_.push_back(kept_.size() - 1);
  }
  void write(File& out) const {
    for (size_t k : outputs_) out.write(kept_[k]);
  }
  Space space() const {
    Space s;
    s.ndim = 2;
    s.size[0] = rows_;
    s.size[1] = cols_;
    s.numel = rows_ * cols_;
    s.rows = rows_;
    return s;
  }

 private:
  int64_t bytes(int64_t planes) const { return rows_ * planes * cols_ * size_of(dtype_); }
  void add(Operand& operand, int64_t planes, std::vector<char> data) {
    kept_.push_back(std::move(data));
    operand.data = kept_.back().data();
    operand.dtype = dtype_;
    operand.stride[0] = planes * cols_;
    operand.stride[1] = 1;
    operand.linear = planes == 1;
  }

  DType dtype_;
  int64_t rows_, cols_;
  std::vector<std::vector<char>> kept_;
  std::vector<size_t> outputs_;
};

const CpuKernels& kernels() {
#define VF_KERNELS_(isa) cpu_kernels_##isa
#define VF_KERNELS(isa) VF_KERNELS_(isa)
  return VF_KERNELS(CPU_CAPABILITY)();
}

// Runs all units; each row's sum.
template <class Problem>
std::vector<double> solve(Problem& p, void (*run)(const Problem&, int64_t, int64_t), int planes = 1) {
  const int64_t cols = p.space.numel / p.space.rows, unit = unit_of(planes), units = (cols + unit - 1) / unit;
  std::vector<double> partial(units * p.space.rows);
  p.sum.partial = partial.data();
  run(p, 0, int64_t(partial.size()));
  std::vector<double> sums(p.space.rows);
  for (int64_t row = 0; row < p.space.rows; ++row) {
    for (int64_t u = 0; u < units; ++u) sums[row] += partial[row * units + u];
  }
  return sums;
}

// Sums of the nll, the nll, and the gradients of its sum.
void reconstruction(File& in, File& out, Arrays& arrays, bool wide) {
  ReconstructionProblem p;
  p.space = arrays.space();
  p.wide = wide;
  p.likelihood = int32_t(in.whole());
  p.nparams = int32_t(in.whole());
  p.planes = int32_t(in.whole());
  p.channels = int32_t(in.whole());
  for (Number& option : p.options) option = in.number();
  const int64_t cols = p.space.size[1];
  p.param_step = p.grad_step = p.planes > 1 ? cols : 0;
  p.target_step = p.channels ? cols : 0;
  for (int k = 0; k < p.nparams; ++k) arrays.read(in, p.param[k], p.planes);
  arrays.read(in, p.target, p.channels ? p.channels : 1);
  p.nll = p.grad = true;
  arrays.output(p.out_nll);
  for (int k = 0; k < p.nparams; ++k) arrays.output(p.out_grad[k], p.planes);
  out.write(solve(p, kernels().reconstruction, p.planes));
  arrays.write(out);
}

// Sums of the KL, the KL, the sample, and the gradients of the KL's sum and of dz times the sample.
void posterior(File& in, File& out, Arrays& arrays, bool wide) {
  PosteriorProblem p;
  p.space = arrays.space();
  p.wide = wide;
  p.activation.kind = int32_t(in.whole());
  p.activation.clamped = in.whole() != 0;
  p.activation.floored = in.whole() != 0;
  p.prior = in.whole() != 0;
  p.activation.lo = in.number();
  p.activation.hi = in.number();
  p.activation.floor = in.number();
  const int64_t seed[2] = {in.whole(), in.whole()};
  p.philox.seed = seed;
  p.philox.offset = seed + 1;
  p.philox.on = p.philox.linear = true;
  p.sample = p.kl = true;
  arrays.read(in, p.mu);
  arrays.read(in, p.raw);
  if (p.prior) {
    arrays.read(in, p.prior_mu);
    arrays.read(in, p.prior_logvar);
  }
  PosteriorProblem backward = p;
  arrays.read(in, backward.dz);
  arrays.output(p.out_kl);
  arrays.output(p.out_z);
  out.write(solve(p, kernels().posterior));
  backward.backward = true;
  backward.dkl.value = 1.0;
  arrays.output(backward.out_dmu);
  arrays.output(backward.out_draw);
  if (p.prior) {
    arrays.output(backward.out_dprior_mu);
    arrays.output(backward.out_dprior_logvar);
  }
  solve(backward, kernels().posterior);
  arrays.write(out);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 1;
  File in(arguments[1], "rb"), out(arguments[2], "wb");
  while (in.more()) {
    const bool of_posterior = in.whole() != 0;
    const auto dtype = DType(in.whole());
    const int64_t rows = in.whole(), cols = in.whole();
    Arrays arrays(dtype, rows, cols);
    (of_posterior ? posterior : reconstruction)(in, out, arrays, dtype == DType::kDouble);
  }
  return 0;
}
