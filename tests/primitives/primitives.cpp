// csrc's primitives over arrays, for tests/test_primitives.py: compiled for each instruction set, as the CPU kernels
// are, and as device code that the SIMT executor runs. A primitive is a line in one of the two lists.

#include <string>
#include <type_traits>

#include "special.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// result n of a primitive's names[n], separated by spaces; without results, the one that a function returns
template <class V>
struct Primitive {
  const char* name;
  const char* results;
  int arguments;
  void (*run)(const V* x, V* y);
};

template <class V>
VF_HD V number(bool x) {
  return lit<V>(x ? 1 : 0);
}

template <class V>
constexpr Primitive<V> kPrimitives[] = {
    {"exp_", "", 1, [](const V* x, V* y) { y[0] = exp_(x[0]); }},
#if !defined(CPU_CAPABILITY) || defined(VF_ONE_LANE)
    {"log_unit", "", 1, [](const V* x, V* y) { y[0] = log_unit(x[0]); }},
#endif
    {"log_", "", 1, [](const V* x, V* y) { y[0] = log_(x[0]); }},
    {"sqrt_", "", 1, [](const V* x, V* y) { y[0] = sqrt_(x[0]); }},
    {"abs_", "", 1, [](const V* x, V* y) { y[0] = abs_(x[0]); }},
    {"at_most", "", 2, [](const V* x, V* y) { y[0] = at_most(x[0], x[1]); }},
    {"fused_", "", 3, [](const V* x, V* y) { y[0] = fused_(x[0], x[1], x[2]); }},
    {"fma_", "", 3, [](const V* x, V* y) { y[0] = fma_(x[0], x[1], x[2]); }},
    {"reciprocal", "", 1, [](const V* x, V* y) { y[0] = reciprocal(x[0]); }},
    {"rint_", "", 1, [](const V* x, V* y) { y[0] = rint_(x[0]); }},
    {"less", "", 2, [](const V* x, V* y) { y[0] = select(less(x[0], x[1]), lit<V>(1), lit<V>(0)); }},
    {"less_equal", "", 2, [](const V* x, V* y) { y[0] = select(less_equal(x[0], x[1]), lit<V>(1), lit<V>(0)); }},
    {"equal", "", 2, [](const V* x, V* y) { y[0] = select(equal(x[0], x[1]), lit<V>(1), lit<V>(0)); }},
    {"select", "", 3, [](const V* x, V* y) { y[0] = select(equal(x[0], lit<V>(1)), x[1], x[2]); }},
    {"any", "", 1, [](const V* x, V* y) { y[0] = number<V>(any(equal(x[0], lit<V>(1)))); }},
    {"log_parts", "mantissa exponent", 1,
     [](const V* x, V* y) {
       const auto p = log_parts(x[0]);
       y[0] = p.mantissa;
       y[1] = p.exponent;
     }},
    {"polynomial(1,-0.5,0.25)", "", 1, [](const V* x, V* y) { y[0] = polynomial(x[0], 1.0, -0.5, 0.25); }},
    {"exp_tail", "", 1, [](const V* x, V* y) { y[0] = exp_tail(x[0]); }},
    {"exp_tail<SHORT>", "", 1, [](const V* x, V* y) { y[0] = exp_tail<true>(x[0]); }},
    {"atanh_tail", "", 1, [](const V* x, V* y) { y[0] = atanh_tail(x[0]); }},
    {"twice_atanh", "", 1, [](const V* x, V* y) { y[0] = twice_atanh(x[0]); }},
    {"atanh_excess", "", 1, [](const V* x, V* y) { y[0] = atanh_excess(x[0]); }},
    {"exp_terms", "root em1 h", 1,
     [](const V* x, V* y) {
       const auto e = exp_terms(x[0]);
       y[0] = e.root;
       y[1] = e.em1;
       y[2] = e.h;
     }},
    {"exp_terms(x,e^(x/2))", "em1 h", 1,
     [](const V* x, V* y) {
       const auto e = exp_terms(x[0], exp_(x[0] * lit<V>(0.5)));
       y[0] = e.em1;
       y[1] = e.h;
     }},
    {"softplus_terms", "step tail sigmoid complement", 1,
     [](const V* x, V* y) {
       const auto s = softplus_terms(x[0]);
       y[0] = s.step;
       y[1] = s.tail;
       y[2] = s.sigmoid;
       y[3] = s.complement;
     }},
    {"softplus(x,terms)", "", 1, [](const V* x, V* y) { y[0] = softplus(x[0], softplus_terms(x[0])); }},
    {"tanh_terms", "tanh slope", 1,
     [](const V* x, V* y) {
       const auto t = tanh_terms(x[0]);
       y[0] = t.tanh;
       y[1] = t.slope;
     }},
    {"log_difference", "log difference", 2,
     [](const V* x, V* y) {
       const auto d = log_difference(x[0], x[1]);
       y[0] = d.log;
       y[1] = d.difference;
     }},
    {"full_log_difference", "log difference", 2,
     [](const V* x, V* y) {
       const auto d = full_log_difference(x[0], x[1]);
       y[0] = d.log;
       y[1] = d.difference;
     }},
    {"stirling_from_one", "value slope", 1,
     [](const V* x, V* y) {
       const auto s = stirling_from_one(x[0]);
       y[0] = s.value;
       y[1] = s.slope;
     }},
    {"stirling", "value slope", 1,
     [](const V* x, V* y) {
       const auto s = stirling(x[0]);
       y[0] = s.value;
       y[1] = s.slope;
     }},
    {"stirling_step(z,1/z,1/(z+1))", "value slope", 1,
     [](const V* x, V* y) {
       const V one = lit<V>(1);
       const auto s = stirling_step(x[0], one / x[0], one / (x[0] + one));
       y[0] = s.value;
       y[1] = s.slope;
     }},
    {"factorial_excess(x,log(x))", "", 1, [](const V* x, V* y) { y[0] = factorial_excess(x[0], log_(x[0])); }},
    {"in_unit", "", 1, [](const V* x, V* y) { y[0] = in_unit(x[0]); }},
    {"count_of", "", 1, [](const V* x, V* y) { y[0] = count_of(x[0]); }},
    {"negative_binomial", "nll dmu dtheta", 3,
     [](const V* x, V* y) {
       const auto t = negative_binomial(x[0], lit<V>(0), x[1], x[2], true);
       y[0] = t.nll;
       y[1] = t.dmu;
       y[2] = t.dtheta;
     }},
    {"deviance(O,E,O-E)", "log value", 2,
     [](const V* x, V* y) {
       const auto d = deviance(x[0], x[1], x[0] - x[1]);
       y[0] = d.log;
       y[1] = d.value;
     }},
    {"rising_term", "rest factor least up dup top dtop", 2,
     [](const V* x, V* y) {
       const auto t = rising_term(x[0], x[1]);
       y[0] = t.rest;
       y[1] = t.factor;
       y[2] = t.least;
       y[3] = t.up;
       y[4] = t.dup;
       y[5] = t.top;
       y[6] = t.dtop;
     }},
    {"beta_binomial(n=x+y)", "nll da db dn", 4,
     [](const V* x, V* y) {
       const auto t = beta_binomial(x[0], x[1], x[2], x[2] + x[3]);
       y[0] = t.nll;
       y[1] = t.da;
       y[2] = t.db;
       y[3] = t.dn;
     }},
};

#if defined(CPU_CAPABILITY) && !defined(VF_ONE_LANE)
// of one vector alone
template <class V>
constexpr Primitive<V> kVectorPrimitives[] = {
    {"log_unit", "", 1, [](const V* x, V* y) { y[0] = log_unit(x[0]); }},
    {"all", "", 1, [](const V* x, V* y) { y[0] = number<V>(all(equal(x[0], lit<V>(1)))); }},
    {"power_of_two", "", 1, [](const V* x, V* y) { y[0] = power_of_two(x[0]); }},
    {"clamp_", "", 3, [](const V* x, V* y) { y[0] = clamp_(x[0], x[1], x[2]); }},
    {"ldexp_", "", 2, [](const V* x, V* y) { y[0] = ldexp_(x[0], x[1]); }},
    {"exp_parts<SMALL>", "root r Q", 1,
     [](const V* x, V* y) {
       const auto e = exp_parts<true>(x[0]);
       y[0] = e.root;
       y[1] = e.r;
       y[2] = e.Q;
     }},
};
#endif

constexpr int kMost = 7;  // arguments, or results

// in[k][0 .. n) is argument k, out[k] result k; n is a multiple of every vector's length.
template <class V, class T>
void run(const Primitive<V>& p, const T* const* in, T* const* out, int results, int64_t n) {
#if defined(CPU_CAPABILITY) && !defined(VF_ONE_LANE)
  for (int64_t i = 0; i < n; i += V::size()) {
    V x[kMost], y[kMost];
    for (int k = 0; k < p.arguments; ++k) x[k] = V::loadu(in[k] + i);
    p.run(x, y);
    for (int k = 0; k < results; ++k) y[k].store(out[k] + i);
  }
#else
  const auto one = [&](int64_t i) {
    T x[kMost] = {}, y[kMost] = {};
    for (int k = 0; k < p.arguments; ++k) x[k] = in[k][i];
    p.run(x, y);
    for (int k = 0; k < results; ++k) out[k][i] = y[k];
  };
#if defined(CPU_CAPABILITY)
  for (int64_t i = 0; i < n; ++i) one(i);
#else
  constexpr int kThreads = 64;
  simt::run(nullptr, (n + kThreads - 1) / kThreads, kThreads, [&] {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < n) one(i);
  });
#endif
#endif
}

template <class V>
std::string described(const Primitive<V>& p, const char* form) {
  return std::string(form) + "|" + p.name + "|" + p.results + "|" + std::to_string(p.arguments) + "\n";
}

// f(primitive, how it is called: by "Wide" or, on AVX-512, by one vector)
template <class T, class F>
void each(const F& f) {
#if defined(CPU_CAPABILITY) && !defined(VF_ONE_LANE)
  for (const auto& p : kPrimitives<Wide<T>>) f(p, "wide");
  for (const auto& p : kVectorPrimitives<Vec<T>>) f(p, "vector");
  if constexpr (!std::is_same_v<Wide<T>, Vec<T>>) {
    for (const auto& p : kPrimitives<Vec<T>>) f(p, "vector");
  }
#else
  for (const auto& p : kPrimitives<T>) f(p, "scalar");
#endif
}

template <class T>
void run_numbered(int index, const T* const* in, T* const* out, int results, int64_t n) {
  each<T>([&](const auto& p, const char*) {
    if (index-- == 0) run(p, in, out, results, n);
  });
}

}  // namespace
}  // namespace VF_ISA
}  // namespace vaefast

#if !defined(CPU_CAPABILITY)
// what the executor tells AddressSanitizer of its stacks, where there is none
extern "C" __attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
extern "C" __attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// A line a primitive: how it is called, its name, its results, how many arguments.
extern "C" const char* describe() {
  static const std::string text = [] {
    std::string lines;
    vaefast::each<float>([&](const auto& p, const char* form) { lines += vaefast::described(p, form); });
    return lines;
  }();
  return text.c_str();
}

extern "C" void run_float(int index, const float* const* in, float* const* out, int results, int64_t n) {
  vaefast::run_numbered(index, in, out, results, n);
}
extern "C" void run_double(int index, const double* const* in, double* const* out, int results, int64_t n) {
  vaefast::run_numbered(index, in, out, results, n);
}
