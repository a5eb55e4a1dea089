// Tiles: up to kTile consecutive elements of the iteration space. An operand that is not plain contiguous memory of the
// arithmetic type (another dtype, a strided or broadcast view, a constant) is brought into an L1 buffer first, so that
// the arithmetic sees contiguous arrays only, and dtypes and strides cost no extra kernels. So is every operand of a
// tile that does not end with a whole vector: its loops run on to the end of that one, over copies of the last element.
// A row's last vector is therefore taken from where it is whole, if its other elements may be taken twice.
#pragma once

#include <cstring>
#include <type_traits>

#include "likelihoods/term.h"
#include "registry.h"
#include "vmath.h"

namespace vaefast {
inline namespace VF_ISA {

constexpr int kTile = 1024;

template <class T>
struct Buffer {
  alignas(64) T data[kTile];
};

struct Tile {
  const Space& space;
  int64_t start;
  int n;
  int again = 0;  // if it is one vector: its first elements, which another tile has added up
};

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType value = DType::kFloat;
};
template <>
struct TypeOf<double> {
  static constexpr DType value = DType::kDouble;
};

// Storage of each dtype, converted by hand: c10's inline conversions would be shared between instruction sets.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

VF_HD float as_float(uint32_t x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
VF_HD uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

VF_HD float load(float x) { return x; }
VF_HD double load(double x) { return x; }
VF_HD float load(bool x) { return x ? 1.0f : 0.0f; }
VF_HD float load(BFloat16 x) { return as_float(uint32_t(x.bits) << 16); }
VF_HD float load(Half x) {
  // shift exponent and mantissa into place, rebias by a multiplication (exact, subnormals too); inf and NaN by hand
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  return as_float(((x.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : finite) | sign);
}

template <class S>
struct Store;
template <>
struct Store<float> {
  template <class T>
  static VF_HD float from(T x) {
    return float(x);
  }
};
template <>
struct Store<double> {
  template <class T>
  static VF_HD double from(T x) {
    return double(x);
  }
};
template <>
struct Store<bool> {
  template <class T>
  static VF_HD bool from(T x) {
    return x != 0;
  }
};
template <>
struct Store<BFloat16> {
  template <class T>
  static VF_HD BFloat16 from(T x) {
    const uint32_t u = as_bits(float(x));
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <>
struct Store<Half> {
  template <class T>
  static VF_HD Half from(T x) {
    const uint32_t u = as_bits(float(x)), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    // normal: round to nearest even at bit 13; subnormal: let a float addition do the rounding; large: inf; NaN
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? tiny : (magnitude >= 0x477ff000u ? 0x7c00u : normal);
    return {uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
  }
};

// f(Tag of what dtype stores).
template <class F>
VF_HD void visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(Tag<float>{});
    case DType::kDouble:
      return f(Tag<double>{});
    case DType::kHalf:
      return f(Tag<Half>{});
    case DType::kBFloat16:
      return f(Tag<BFloat16>{});
    case DType::kBool:
      return f(Tag<bool>{});
  }
}

// Calls f(first element's position in the tile, count, element offset in memory) for each run along the last dimension.
template <class F>
VF_HD void for_runs(const Tile& t, const int64_t* stride, F f) {
  const Space& s = t.space;
  const int last = s.ndim - 1;
  int64_t index[kMaxDims], rest = t.start, offset = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % s.size[d];
    rest /= s.size[d];
    offset += index[d] * stride[d];
  }
  for (int done = 0; done < t.n;) {
    const int64_t left = s.size[last] - index[last];
    const int count = int(left < t.n - done ? left : t.n - done);
    f(done, count, offset);
    done += count;
    index[last] += count;
    offset += count * stride[last];
    for (int d = last; d > 0 && index[d] == s.size[d]; --d) {
      offset += stride[d - 1] - s.size[d] * stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Where the tile of an operand can be used in place, or null.
template <class T>
VF_HD T* in_place(const Operand& op, const Tile& t) {
  if (op.dtype != TypeOf<T>::value || op.data == nullptr || t.n % kLanes<T> != 0) return nullptr;
  T* data = static_cast<T*>(op.data);
  if (op.linear) return data + t.start;
  const int last = t.space.ndim - 1;
  if (op.stride[last] != 1 || t.start % t.space.size[last] + t.n > t.space.size[last]) return nullptr;
  T* found = nullptr;
  for_runs(t, op.stride, [&](int, int, int64_t offset) { found = data + offset; });
  return found;
}

// Whether a likelihood's elements may be taken twice: not where a gradient takes the place of what it is computed from,
// nor where a tile of kLanes is two vectors.
template <class L>
VF_HD bool repeats(const ReconstructionProblem& p) {
  for (const Operand& grad : p.out_grad) {
    for (const Operand& param : p.param) {
      if (grad.data && grad.data == param.data) return false;
    }
  }
  return !kSingle<L>;
}

// The tile of an operand, in its own memory or brought into the buffer; run_copies.cpp.
template <class T>
const T* read(const Operand& op, const Tile& t, Buffer<T>& buffer);
// Where to put an output's tile: its own memory, or the buffer that write_back() takes it from.
template <class T>
T* writable(const Operand& op, const Tile& t, Buffer<T>& buffer);
template <class T>
void write_back(const Operand& op, const Tile& t, const Buffer<T>& buffer);

// n elements of an operand from the given one on, `step` apart, to and from numbers `to_step`, `from_step` apart.
template <class T>
void load_run(const Operand& op, int64_t from, int64_t step, int n, T* to, int64_t to_step);
template <class T>
void store_run(const Operand& op, int64_t to, int64_t step, int n, const T* from, int64_t from_step);

// Doubles are for precision: one loop does what floats have several for, and computes what is not asked for into
// buffers.
template <class T>
constexpr bool kFewLoops = std::is_same_v<T, double>;

template <class V>
constexpr int lanes() {
  if constexpr (std::is_floating_point_v<V>) {
    return 1;
  } else {
    return V::size();
  }
}

// What a likelihood's loops compute with.
template <class L, class T>
using LanesOf = std::conditional_t<kSingle<L>, Vec<T>, Wide<T>>;

// f(position) for each vector of the tile.
template <class T, class V = Wide<T>, class F>
VF_HD void for_vectors(int n, F f) {
  for (int i = 0; i < n; i += lanes<V>()) f(i);
}

template <class V, class T>
VF_HD V load_lanes(const T* p) {
  if constexpr (std::is_same_v<V, T>) {
    return *p;
  } else {
    return V::loadu(p);
  }
}

template <class V, class T>
VF_HD void store_lanes(const V& x, T* p) {
  if constexpr (std::is_same_v<V, T>) {
    *p = x;
  } else {
    x.store(p);
  }
}

template <class T, class V = Wide<T>>
VF_HD V at(const T* p, int i) {
  return load_lanes<V>(p + i);
}

template <class T, class V>
VF_HD void put(T* p, int i, V x) {
  store_lanes(x, p + i);
}

// A vector's lanes of which no more than `left` are there.
template <class T>
VF_HD Wide<T> load_some(const T* p, int left) {
  if (left >= kLanes<T>) return at(p, 0);
  T lanes[kLanes<T>] = {};
  for (int l = 0; l < left; ++l) lanes[l] = p[l];
  return at(lanes, 0);
}
template <class T>
VF_HD void store_some(T* p, Wide<T> x, int left) {
  if (left >= kLanes<T>) return put(p, 0, x);
  T lanes[kLanes<T>];
  put(lanes, 0, x);
  for (int l = 0; l < left; ++l) p[l] = lanes[l];
}

// f(i, left) for each vector of n elements in memory that ends with them, of whose lanes `left` are there.
template <class T, class F>
VF_HD void for_some(int n, const F& f) {
  constexpr int step = kLanes<T>;
  int i = 0;
  for (; i + step <= n; i += step) f(i, step);
  if (i < n) f(i, n - i);
}

// The sum of a vector's lanes, in double and in an order of its own.
template <class T, class V>
double sum_of_lanes(const V& x) {
  constexpr int kOwn = lanes<V>();
  T lanes[kOwn];
  store_lanes(x, lanes);
  // one chain of additions would take as long as a sixth of a tile
  constexpr int kChains = kOwn < 8 ? kOwn : 8;
  double s[kChains] = {};
  for (int l = 0; l < kOwn; l += kChains) {
    for (int k = 0; k < kChains; ++k) s[k] += double(lanes[l + k]);
  }
  for (int half = kChains / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) s[k] += s[k + half];
  }
  return s[0];
}

// Vector partial sums of a tile, added up in double in an order of their own.
template <class T, class V = Wide<T>>
class Accumulator {
 public:
  explicit Accumulator(const Tile& t) : t_(t), n_(t.n - t.again) {}

  VF_HD void add(int i, V x) {
    if (n_ - i >= kOwn) {
      // equal numbers are rounded alike, all in one direction: so that no chain of additions is long
      if (i % (kChain * kOwn) == 0) {
        chains_ = chains_ + sum_;
        sum_ = x;
      } else {
        sum_ = sum_ + x;
      }
      return;
    }
    // what another tile has added up, and what stands behind this one's end, is not of the sum
    T lanes[kOwn], last[kOwn];
    store_lanes(sum_, lanes);
    store_lanes(x, last);
    for (int l = 0; l < n_ - i; ++l) lanes[l] += last[t_.again + l];
    sum_ = load_lanes<V>(lanes);
  }

  double total() const { return sum_of_lanes<T>(chains_ + sum_); }

 private:
  static constexpr int kOwn = lanes<V>(), kChain = 32;
  const Tile& t_;
  int n_;
  V sum_ = V(T(0)), chains_ = V(T(0));
};

// Runs body(tile), which returns the tile's sum, over the units [begin, end); a unit is so many tiles of so many
// elements. What is left of a row behind its last `whole` elements, a vector's, is a tile of its own, with as many of
// those before it as make it whole where they may be taken `twice`: else its operands are brought into buffers.
template <class F>
void for_units(const Space& space, double* partial, int64_t unit, int tile, int64_t begin, int64_t end, F body,
               int whole, bool twice) {
  const int64_t cols = space.rows ? space.numel / space.rows : 0;
  const int64_t per_row = (cols + unit - 1) / unit;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t row = u / per_row, first = row * cols + (u % per_row) * unit;
    const int64_t limit = first + unit < (row + 1) * cols ? first + unit : (row + 1) * cols;
    double sum = 0;
    for (int64_t start = first; start < limit;) {
      int n = int(limit - start < tile ? limit - start : tile);
      if (n > whole) n -= n % whole;
      const int again = twice && n < whole && start - first >= whole - n ? whole - n : 0;
      sum += body(Tile{space, start - again, n + again, again});
      start += n;
    }
    if (partial) partial[u] = sum;
  }
}

}  // namespace VF_ISA
}  // namespace vaefast
