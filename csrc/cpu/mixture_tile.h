// A mixture's tile: kSites sites with all their planes, each in place or brought into a buffer, as tile.h does it for
// single operands.
#pragma once

#include <cstdlib>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/planes.h"
#include "likelihoods/term.h"
#include "mixture.h"
#include "weight.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// Plane k of a tile begins at data + k * step.
template <class T>
struct Planes {
  T* data;
  int64_t step;

  VF_HD T* operator[](int k) const { return data + k * step; }
};

template <class T>
Planes<T> writable(const PlaneOperand& o, const Tile& t, T* buffer) {
  if (T* direct = in_place<T>(o.op, t)) return {direct, o.step};
  return {buffer, kSites};
}

template <class T>
Planes<T> read(const PlaneOperand& o, const Tile& t, T* buffer) {
  const Planes<T> planes = writable(o, t, buffer);
  if (planes.data != buffer) return planes;
  for_plane_runs(o, t, kSites, [&](int64_t from, int64_t step, int n, int64_t to, int64_t to_step) {
    load_run(o.op, from, step, n, buffer + to, to_step);
  });
  return planes;
}

template <class T>
void write_back(const PlaneOperand& o, const Tile& t, const T* buffer) {
  if (in_place<T>(o.op, t)) return;
  for_plane_runs(o, t, kSites, [&](int64_t to, int64_t step, int n, int64_t from, int64_t from_step) {
    store_run(o.op, to, step, n, buffer + from, from_step);
  });
}

// Buffers of many planes, for one thread.
template <class T>
class Scratch {
 public:
  explicit Scratch(const ReconstructionProblem& p)
      : planes_(p.planes), data_(static_cast<T*>(std::malloc(sizeof(T) * kSites * (2 * planes_ + 4)))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* params() const { return data_; }
  T* grads() const { return data_ + kSites * planes_; }
  T* target() const { return data_ + 2 * kSites * planes_; }

 private:
  int64_t planes_;
  T* data_;
};

// What mixture_nll() asks of a vector of sites.
template <class T, class Lanes, bool GRAD>
struct Site {
  using V = Lanes;
  Planes<T> params, targets, gradients;
  int components_, i;
  V scale, weight;
  bool has_weight;

  VF_HD int components() const { return components_; }
  VF_HD V param(int plane) const { return at<T, V>(params[plane], i); }
  VF_HD V target(int c) const { return at<T, V>(targets[c], i); }
  static VF_HD bool grads() { return GRAD; }
  static VF_HD bool keeps() { return GRAD; }
  VF_HD void keep(int plane, V x) const { put(gradients[plane], i, x); }
  VF_HD V kept(int plane) const { return at<T, V>(gradients[plane], i); }

  VF_HD V weigh(V x) const { return has_weight ? weighted(weight, x) : x; }
  VF_HD void grad(int plane, V g) const { put(gradients[plane], i, weigh(g * scale)); }
};

template <class T, class L, int C, bool GRAD>
double mixture_tile(const ReconstructionProblem& p, const Tile& t, const Scratch<T>& scratch) {
  using V = LanesOf<L, T>;
  Buffer<T> weight_buffer, upstream_buffer, nll_buffer;
  const PlaneOperand param{p.param[0], p.param_step, p.planes}, target{p.target, p.target_step, C > 0 ? C : 1},
      gradient{p.out_grad[0], p.grad_step, p.planes};
  const T* weight = p.weight.data ? read(p.weight, t, weight_buffer) : nullptr;
  const T* upstream = p.upstream.data ? read(p.upstream, t, upstream_buffer) : nullptr;
  T* nll = writable(p.out_nll, t, nll_buffer);
  const bool each = p.out_nll.data != nullptr;
  const V factor = lit<V>(p.grad_scale);
  Site<T, V, GRAD> site{read(param, t, scratch.params()),
                        read(target, t, scratch.target()),
                        GRAD ? writable(gradient, t, scratch.grads()) : Planes<T>{},
                        p.planes / (1 + kComponentParams<L, C>),
                        0,
                        factor,
                        factor,
                        weight != nullptr};
  Accumulator<T, V> sum(t);
  for_vectors<T, V>(t.n, [&](int i) {
    site.i = i;
    if (weight) site.weight = at<T, V>(weight, i);
    if (upstream) site.scale = factor * at<T, V>(upstream, i);
    const V value = site.weigh(mixture_nll<L, C>(site, site.components(), p.options));
    sum.add(i, value);
    if (each) put(nll, i, value);
  });
  write_back(p.out_nll, t, nll_buffer);
  if constexpr (GRAD) write_back(gradient, t, scratch.grads());
  return sum.total();
}

// Where each element of a tile is in an operand's memory.
VF_HD void offsets_of(const Operand& op, const Tile& t, int64_t* out) {
  const int64_t inner = op.stride[t.space.ndim - 1];
  for_runs(t, op.stride, [&](int at, int n, int64_t offset) {
    for (int i = 0; i < n; ++i) out[at + i] = offset + i * inner;
  });
}

// Classes that lie next to each other, as in text, [B, T, K]: one site after the other, its classes in vectors, by the
// same formulas. A row is brought into scratch memory, and filled up with what adds nothing.
template <class T, bool GRAD>
double class_rows(const ReconstructionProblem& p, const Tile& t, const Scratch<T>& scratch) {
  using V = Wide<T>;
  using Limits = std::numeric_limits<T>;
  const int K = p.planes;
  Buffer<T> target_buffer, weight_buffer, upstream_buffer, nll_buffer;
  const T* target = read(p.target, t, target_buffer);
  const T* weight = read(p.weight, t, weight_buffer);
  const T* upstream = read(p.upstream, t, upstream_buffer);
  T *nll = writable(p.out_nll, t, nll_buffer), *row = scratch.params(), lanes[kLanes<T>];
  int64_t from[kSites], to[kSites];
  offsets_of(p.param[0], t, from);
  if constexpr (GRAD) offsets_of(p.out_grad[0], t, to);
  double total = 0;
  for (int i = 0; i < t.n; ++i) {
    const T x = target[i], w = weight[i];
    T value = 0;
    if (w != 0) {
      load_run(p.param[0], from[i], 1, K, row, 1);
      for (int k = K; k % kLanes<T> != 0; ++k) row[k] = -Limits::infinity();
      V most = lit<V>(-3e38), sum = lit<V>(0);
      for_vectors<T>(K, [&](int k) { most = select(less(most, at(row, k)), at(row, k), most); });
      store_lanes(most, lanes);
      T top = lanes[0];
      for (T lane : lanes) top = top < lane ? lane : top;
      const bool known = x >= 0 && x < T(K) && x == T(int(x));
      const T picked = known ? row[int(x)] - top : Limits::quiet_NaN();
      for_vectors<T>(K, [&](int k) {
        const V e = exp_(at(row, k) - V(top));
        put(row, k, e);
        sum = sum + e;
      });
      store_lanes(sum, lanes);
      T whole = 0;
      for (T lane : lanes) whole += lane;
      value = w * (log_(whole) - picked);
      if constexpr (GRAD) {
        const T scale = w * upstream[i] * lit<T>(p.grad_scale);
        const V factor = V(known ? scale / whole : Limits::quiet_NaN());
        for_vectors<T>(K, [&](int k) { put(row, k, at(row, k) * factor); });
        if (known) row[int(x)] -= scale;
      }
    } else {
      for_vectors<T>(K, [&](int k) { put(row, k, lit<V>(0)); });
    }
    if constexpr (GRAD) store_run(p.out_grad[0], to[i], p.grad_step, K, row, 1);
    total += double(value);
    if (p.out_nll.data) nll[i] = value;
  }
  write_back(p.out_nll, t, nll_buffer);
  return total;
}

template <class T, class L>
void mixture_units(const ReconstructionProblem& p, int64_t begin, int64_t end) {
  const Scratch<T> scratch(p);
  const bool rows = p.param_step == 1 && p.space.numel > 1;
  visit(p.channels, typename L::Channels{}, [&](auto channels) {
    constexpr int C = decltype(channels)::value;
    const auto body = [&](const Tile& t) {
      if constexpr (kComponentParams<L, C> == 0) {
        if (rows) return p.grad ? class_rows<T, true>(p, t, scratch) : class_rows<T, false>(p, t, scratch);
      }
      return p.grad ? mixture_tile<T, L, C, true>(p, t, scratch) : mixture_tile<T, L, C, false>(p, t, scratch);
    };
    const bool twice = !rows && repeats<L>(p);
    for_units(p.space, p.sum.partial, unit_of(p.planes), kSites, begin, end, body, kLanes<T>, twice);
  });
}

}  // namespace
}  // namespace VF_ISA
}  // namespace vaefast
