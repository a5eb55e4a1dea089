// Sites of several classes in a block of numbers, and two ways for them to lie there: a site a lane, so that what is
// made of a site's classes never goes across lanes, and for many classes a site at a time, a piece of it after another.
#pragma once

#include "cpu/planes.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

// numbers of a block
constexpr int kBlock = 2048;

// Rows and columns of a square as wide as a vector change places: each round puts the rows' numbers one after the
// other by turns.
template <class T>
VF_HD void transpose(Vec<T>* rows) {
#if !defined(VF_ONE_LANE)
  constexpr int n = lanes<Vec<T>>();
  Vec<T> next[n];
  for (int round = 1; round < n; round *= 2) {
    for (int i = 0; i < n / 2; ++i) {
      const auto [head, tail] = at::vec::interleave2(rows[i], rows[i + n / 2]);
      next[2 * i] = head;
      next[2 * i + 1] = tail;
    }
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
#endif
}

// As many rows as a vector has lanes, from numbers that are `step` apart to `to_step` apart: columns of the first are
// rows of the second. What is left of them behind the last whole square goes one by one.
template <class T>
VF_CALLED void transposed(const T* from, int64_t step, int columns, T* to, int64_t to_step, bool back) {
  constexpr int n = lanes<Vec<T>>();
  int k = 0;
  for (; k + n <= columns; k += n) {
    Vec<T> square[n];
    for (int i = 0; i < n; ++i) square[i] = at<T, Vec<T>>(back ? from + (k + i) * step : from + i * step + k, 0);
    transpose<T>(square);
    for (int i = 0; i < n; ++i) put(back ? to + i * to_step + k : to + (k + i) * to_step, 0, square[i]);
  }
  for (; k < columns; ++k) {
    for (int i = 0; i < n; ++i) {
      back ? (to[i * to_step + k] = from[k * step + i]) : (to[k * to_step + i] = from[i * step + k]);
    }
  }
}

// The sites of a run that go by squares, and f(first site, its element of memory) for each vector of them.
template <class T, class F>
int by_squares(const PlaneOperand& o, int64_t inner, int n, int64_t offset, const F& f) {
  constexpr int width = lanes<Vec<T>>();
  if (width == 1 || o.step != 1 || o.count < width || o.op.dtype != TypeOf<T>::value) return 0;
  int i = 0;
  for (; i + width <= n; i += width) f(i, offset + i * inner);
  return i;
}

// Numbers of a block, in vectors.
template <class T>
struct ClassBlock {
  using V = Wide<T>;
  alignas(64) T data[kBlock];

  VF_HD V at(int i) const { return load_lanes<V>(data + i); }
  VF_HD void put(int i, V x) { store_lanes(x, data + i); }
};

// Few classes: class k of site l is number k * kAtOnce + l.
template <class T>
struct SiteALane {
  using V = Wide<T>;
  using Numbers = ClassBlock<T>;
  static constexpr int kAtOnce = lanes<V>();

  const Tile& t;

  static int64_t piece() { return kBlock / kAtOnce; }
  template <class F>
  static VF_HD void for_each(int count, const F& f) {
    for (int k = 0; k < count; ++k) f(k * kAtOnce);
  }
  static VF_HD V sum(V x) { return x; }
  static VF_HD V most(V x) { return x; }

  VF_CALLED void read(const Operand& op, int64_t step, int64_t first, int count, Numbers& numbers, double) const {
    T* to = numbers.data;
    if (!op.data) return fill(op, count, to);
    const PlaneOperand o{op, step, count, first};
    const T* data = static_cast<const T*>(op.data);
    const int64_t inner = op.stride[t.space.ndim - 1];
    for_runs(t, op.stride, [&](int at, int n, int64_t offset) {
      const int done = by_squares<T>(o, inner, n, offset, [&](int i, int64_t from) {
        transposed(data + from, inner, count, to + at + i, kAtOnce, false);
      });
      for_planes(o, inner, at + done, n - done, offset + done * inner, kAtOnce,
                 [&](int64_t from, int64_t step, int count, int64_t place, int64_t to_step) {
                   load_run(op, from, step, count, to + place, to_step);
                 });
    });
    // lanes without a site compute what the first one does
    for (int k = 0; t.n < kAtOnce && k < count; ++k) {
      for (int l = t.n; l < kAtOnce; ++l) to[k * kAtOnce + l] = to[k * kAtOnce];
    }
  }

  VF_CALLED void write(const Operand& op, int64_t step, int64_t first, int count, const Numbers& numbers) const {
    if (!op.data) return;
    const PlaneOperand o{op, step, count, first};
    const T* from = numbers.data;
    T* data = static_cast<T*>(op.data);
    const int64_t inner = op.stride[t.space.ndim - 1];
    for_runs(t, op.stride, [&](int at, int n, int64_t offset) {
      const int done = by_squares<T>(o, inner, n, offset, [&](int i, int64_t to) {
        transposed(from + at + i, kAtOnce, count, data + to, inner, true);
      });
      for_planes(o, inner, at + done, n - done, offset + done * inner, kAtOnce,
                 [&](int64_t to, int64_t step, int count, int64_t place, int64_t from_step) {
                   store_run(op, to, step, count, from + place, from_step);
                 });
    });
  }

 private:
  static void fill(const Operand& op, int count, T* to) {
    for (int i = 0; i < count * kAtOnce; ++i) to[i] = lit<T>(op.value);
  }
};

// Many classes: class k of the one site is number k.
template <class T>
struct SiteAtATime {
  using V = Wide<T>;
  using Numbers = ClassBlock<T>;
  static constexpr int kAtOnce = 1, kLanes = lanes<V>();

  const Tile& t;

  static int64_t piece() { return kBlock; }
  template <class F>
  static VF_HD void for_each(int count, const F& f) {
    for_vectors<T>(count, f);
  }
  static VF_HD V sum(V x) { return V(T(sum_of_lanes<T>(x))); }
  static VF_HD V most(V x) {
    T each[kLanes];
    store_lanes(x, each);
    T found = each[0];
    for (T other : each) found = found < other ? other : found;
    return V(found);
  }

  VF_CALLED void read(const Operand& op, int64_t step, int64_t first, int count, Numbers& numbers,
                      double missing) const {
    T* to = numbers.data;
    for (int k = 0; !op.data && k < count; ++k) to[k] = lit<T>(op.value);
    if (op.data) {
      for_plane_runs({op, step, count, first}, t, 1, [&](int64_t from, int64_t step, int count, int64_t, int64_t) {
        load_run(op, from, step, count, to, 1);
      });
    }
    for (int k = count; k % kLanes != 0; ++k) to[k] = T(missing);
  }

  VF_CALLED void write(const Operand& op, int64_t step, int64_t first, int count, const Numbers& numbers) const {
    if (!op.data) return;
    for_plane_runs({op, step, count, first}, t, 1, [&](int64_t to, int64_t step, int count, int64_t, int64_t) {
      store_run(op, to, step, count, numbers.data, 1);
    });
  }
};

// A number for each site.
template <class T>
void read_sites(const Operand& op, const Tile& t, T* to) {
  for (int l = 0; !op.data && l < t.n; ++l) to[l] = lit<T>(op.value);
  if (!op.data) return;
  for_runs(t, op.stride,
           [&](int at, int n, int64_t offset) { load_run(op, offset, op.stride[t.space.ndim - 1], n, to + at, 1); });
}

template <class T>
void write_sites(const Operand& op, const Tile& t, const T* from) {
  if (!op.data) return;
  for_runs(t, op.stride,
           [&](int at, int n, int64_t offset) { store_run(op, offset, op.stride[t.space.ndim - 1], n, from + at, 1); });
}

}  // namespace
}  // namespace VF_ISA
}  // namespace vaefast
