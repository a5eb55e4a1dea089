// Between an operand's memory and the buffer of a tile: any layout, any dtype.

#include "cpu/tile.h"

namespace vaefast {
inline namespace VF_ISA {
namespace {

template <class T, class S>
VF_HD void gather(const Operand& op, const Tile& t, T* to) {
  const S* from = static_cast<const S*>(op.data);
  if (op.linear) {
    for (int i = 0; i < t.n; ++i) to[i] = T(load(from[t.start + i]));
    return;
  }
  const int64_t inner = op.stride[t.space.ndim - 1];
  for_runs(t, op.stride, [&](int at, int count, int64_t offset) {
    if (inner == 1) {
      for (int i = 0; i < count; ++i) to[at + i] = T(load(from[offset + i]));
    } else if (inner == 0) {
      const T x = T(load(from[offset]));
      for (int i = 0; i < count; ++i) to[at + i] = x;
    } else {
      for (int i = 0; i < count; ++i) to[at + i] = T(load(from[offset + i * inner]));
    }
  });
}

template <class T, class S>
VF_HD void scatter(const Operand& op, const Tile& t, const T* from) {
  S* to = static_cast<S*>(op.data);
  const int64_t inner = op.stride[t.space.ndim - 1];
  if (op.linear) {
    for (int i = 0; i < t.n; ++i) to[t.start + i] = Store<S>::from(from[i]);
    return;
  }
  for_runs(t, op.stride, [&](int at, int count, int64_t offset) {
    for (int i = 0; i < count; ++i) to[offset + i * inner] = Store<S>::from(from[at + i]);
  });
}

}  // namespace

template <class T>
const T* read(const Operand& op, const Tile& t, Buffer<T>& buffer) {
  if (const T* direct = in_place<T>(op, t)) return direct;
  T* to = buffer.data;
  if (op.data == nullptr) {
    for (int i = 0; i < t.n; ++i) to[i] = lit<T>(op.value);
  } else {
    visit(op.dtype, [&](auto tag) { gather<T, typename decltype(tag)::type>(op, t, to); });
  }
  // a subnormal number left there would cost some hundred cycles an operation
  for (int i = t.n; i % kLanes<T> != 0; ++i) to[i] = to[t.n - 1];
  return to;
}

template <class T>
T* writable(const Operand& op, const Tile& t, Buffer<T>& buffer) {
  T* direct = in_place<T>(op, t);
  return direct ? direct : buffer.data;
}

template <class T>
void write_back(const Operand& op, const Tile& t, const Buffer<T>& buffer) {
  if (op.data == nullptr || in_place<T>(op, t)) return;
  visit(op.dtype, [&](auto tag) { scatter<T, typename decltype(tag)::type>(op, t, buffer.data); });
}

template <class T>
void load_run(const Operand& op, int64_t from, int64_t step, int n, T* to, int64_t to_step) {
  visit(op.dtype, [&](auto tag) {
    const auto* data = static_cast<const typename decltype(tag)::type*>(op.data) + from;
    if (step == 1 && to_step == 1) {
      for (int i = 0; i < n; ++i) to[i] = T(load(data[i]));
    } else {
      for (int i = 0; i < n; ++i) to[i * to_step] = T(load(data[i * step]));
    }
  });
}

template <class T>
void store_run(const Operand& op, int64_t to, int64_t step, int n, const T* from, int64_t from_step) {
  visit(op.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    S* data = static_cast<S*>(op.data) + to;
    if (step == 1 && from_step == 1) {
      for (int i = 0; i < n; ++i) data[i] = Store<S>::from(from[i]);
    } else {
      for (int i = 0; i < n; ++i) data[i * step] = Store<S>::from(from[i * from_step]);
    }
  });
}

#define VF_COPIES(T)                                                          \
  template const T* read(const Operand&, const Tile&, Buffer<T>&);            \
  template T* writable(const Operand&, const Tile&, Buffer<T>&);              \
  template void write_back(const Operand&, const Tile&, const Buffer<T>&);    \
  template void load_run(const Operand&, int64_t, int64_t, int, T*, int64_t); \
  template void store_run(const Operand&, int64_t, int64_t, int, const T*, int64_t);
VF_COPIES(float)
VF_COPIES(double)

}  // namespace VF_ISA
}  // namespace vaefast
