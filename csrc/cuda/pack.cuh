// Packs: the N consecutive elements of the iteration space that a thread handles at once; N is kPack<T> where every
// operand can be moved a pack at a time, else 1 (Space::moves, decided at launch). An operand is fetched as it lies
// in memory and decoded to the arithmetic type afterwards: so all loads of a pack are under way before the first is
// waited for, and dtypes and strides cost no extra kernels. No torch types here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "philox.h"

namespace vaefast {

// 16 bytes, and a whole Philox counter. Doubles are for precision: they go one by one, which halves their code.
template <class T>
constexpr int kPack = sizeof(T) == 4 ? 4 : 1;

inline int size_of(DType t) { return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : t == DType::kBool ? 1 : 2; }

// One of Moves as a type: packs of N elements; S is what a plain move's linear operands hold, else void. Listed: each
// posterior of a list has operands of its own.
template <int N_, class S_ = void, bool LISTED = false>
struct Move {
  using S = S_;
  static constexpr int N = N_;
  static constexpr bool plain = !std::is_void_v<S>, listed = LISTED;
};

// f(Move): what depends on it is decided once, outside the loops in f.
template <class T, bool LISTED, class F>
__device__ inline auto visit(Moves moves, const F& f) {
  if constexpr (kPack<T> > 1) {
    if (moves == Moves::kPlain) return f(Move<kPack<T>, T, LISTED>{});
    if (moves == Moves::kPlainHalf) return f(Move<kPack<T>, __half, LISTED>{});
    if (moves == Moves::kPlainBFloat16) return f(Move<kPack<T>, __nv_bfloat16, LISTED>{});
    if (moves == Moves::kPacked) return f(Move<kPack<T>, void, LISTED>{});
  }
  return f(Move<1, void, LISTED>{});
}

// Elements start + lo .. start + hi - 1 of the space, where start is a multiple of N.
struct Pack {
  const Space& space;
  int64_t start;
  int lo, hi;
  int64_t outer = 0, column = 0;  // start's place before and in the last dimension, where the space has views
  uint32_t row = 0;               // the former, for plain moves
  void* const* data = nullptr;    // listed moves: where each operand lies

  __device__ bool holds(int i) const { return i >= lo && i < hi; }
};

// quotient and remainder; in 32 bits where the whole space fits, for the 64-bit division is several times as long
__device__ inline void divide(const Space& s, int64_t x, int64_t size, int64_t& quotient, int64_t& rest) {
  if (s.numel <= 0x7fffffff) {
    const uint32_t q = uint32_t(x) / uint32_t(size);
    quotient = q;
    rest = uint32_t(x) - q * uint32_t(size);
  } else {
    quotient = int64_t(uint64_t(x) / uint64_t(size));
    rest = x - quotient * size;
  }
}

__device__ inline bool is_scalar(const Operand& op) {
  return op.access == Access::kScalar || op.access == Access::kRowScalar;
}

// Where the pack begins in the memory of an operand with these strides.
__device__ inline int64_t view_offset(const Pack& at, const int64_t* stride) {
  const Space& s = at.space;
  int64_t outer = at.outer, offset = at.column * stride[s.ndim - 1], index;
#pragma unroll 1
  for (int d = s.ndim - 2; d > 0; --d) {
    divide(s, outer, s.size[d], outer, index);
    offset += index * stride[d];
  }
  return s.ndim > 1 ? offset + outer * stride[0] : offset;
}

template <class M>
__device__ inline void* data_of(const Operand& op, const Pack& at) {
  if constexpr (M::listed) return at.data[op.number];
  return op.data;
}

template <class S, class M>
__device__ inline S* address(const Operand& op, const Pack& at) {
  S* data = static_cast<S*>(data_of<M>(op, at));
  if (op.access == Access::kScalar) return data;
  return data + (op.access == Access::kLinear ? at.start : view_offset(at, op.stride));
}

// Elements as they lie in memory; a whole pack of them is moved by one instruction.
template <class S, int N>
struct alignas(N * sizeof(S)) Chunk {
  S item[N];
};

// A fetched pack, its elements from the low end on.
template <class T, int N>
struct Bits {
  alignas(N * sizeof(T)) uint32_t word[N * sizeof(T) / 4];

  template <class C>
  __device__ C as() const {
    static_assert(sizeof(C) <= sizeof(Bits));
    C chunk;
    memcpy(&chunk, word, sizeof(C));
    return chunk;
  }

  template <class C>
  __device__ static Bits of(const C& chunk) {
    Bits bits{};
    memcpy(bits.word, &chunk, sizeof(C));
    return bits;
  }
};

// What has the size of an S and moves like one.
template <class S>
using Raw = std::conditional_t<sizeof(S) == 4, uint32_t, uint16_t>;

// Where plain moves find an operand's row, or the scalar for it; and a pack in the row.
template <class S, class M>
__device__ inline S* plain_row(const Operand& op, const Pack& at) {
  return reinterpret_cast<S*>(static_cast<char*>(data_of<M>(op, at)) + product(at.row, op.skip));
}

template <class S, class M>
__device__ inline Chunk<S, M::N>* plain_address(const Operand& op, const Pack& at) {
  return reinterpret_cast<Chunk<S, M::N>*>(plain_row<S, M>(op, at) + uint32_t(at.start));
}

template <class T, class M, class S, int N = M::N>
__device__ inline Bits<T, N> fetch_as(const Operand& op, const Pack& at) {
  using C = Chunk<S, N>;
  C chunk{};
  const S* p = address<const S, M>(op, at);
  if (N > 1 && is_scalar(op)) {
    const S x = *p;
#pragma unroll
    for (int i = 0; i < N; ++i) chunk.item[i] = x;
  } else if (N == 1 || (at.lo == 0 && at.hi == N)) {
    chunk = *reinterpret_cast<const C*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at.holds(i)) chunk.item[i] = p[i];
    }
  }
  return Bits<T, N>::of(chunk);
}

template <class T, class M, class S, int N = M::N>
__device__ inline void put_as(const Operand& op, const Pack& at, const Bits<T, N>& bits) {
  using C = Chunk<S, N>;
  const C chunk = bits.template as<C>();
  S* p = address<S, M>(op, at);
  if (N == 1 || (at.lo == 0 && at.hi == N)) {
    *reinterpret_cast<C*>(p) = chunk;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at.holds(i)) p[i] = chunk.item[i];
    }
  }
}

// Of an operand as large as the space. Arithmetic in float never meets double in memory (problem.wide).
template <class T, class M, int N = M::N>
__device__ inline Bits<T, N> fetch(const Operand& op, const Pack& at) {
  if constexpr (M::plain) {
    const auto chunk = *plain_address<Raw<typename M::S>, M>(op, at);
    return Bits<T, N>::of(chunk);
  }
  if constexpr (sizeof(T) == 8) {
    if (op.dtype == DType::kDouble) return fetch_as<T, M, uint64_t>(op, at);
  }
  if (op.dtype == DType::kFloat) return fetch_as<T, M, uint32_t>(op, at);
  return op.dtype == DType::kBool ? fetch_as<T, M, uint8_t>(op, at) : fetch_as<T, M, uint16_t>(op, at);
}

// Of an operand that may be absent, or one number: then nothing is fetched, or that.
template <class T, class M, int N = M::N>
__device__ inline Bits<T, N> fetch_optional(const Operand& op, const Pack& at) {
  if (op.access == Access::kConstant) return {};
  if (M::plain && is_scalar(op)) {
    Bits<T, N> bits;
    bits.word[0] = *plain_row<uint32_t, M>(op, at);
    return bits;
  }
  return fetch<T, M>(op, at);
}

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(bool x) { return x ? 1.0f : 0.0f; }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S, class T>
__device__ inline S stored(T x) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(float(x));
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(float(x));
  } else {
    return S(x);
  }
}

template <class S, class T, int N>
__device__ inline void decode_as(const Bits<T, N>& bits, T (&out)[N]) {
  const auto chunk = bits.template as<Chunk<S, N>>();
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = T(load(chunk.item[i]));
}

template <class M, class T, int N>
__device__ inline void decode(const Operand& op, const Bits<T, N>& bits, T (&out)[N]) {
  if constexpr (M::plain) return decode_as<typename M::S>(bits, out);
  if constexpr (sizeof(T) == 8) {
    if (op.dtype == DType::kDouble) return decode_as<double>(bits, out);
  }
  if (op.dtype == DType::kFloat) return decode_as<float>(bits, out);
  if (op.dtype == DType::kBFloat16) return decode_as<__nv_bfloat16>(bits, out);
  op.dtype == DType::kHalf ? decode_as<__half>(bits, out) : decode_as<bool>(bits, out);
}

template <class M, class T, int N>
__device__ inline void decode_optional(const Operand& op, const Bits<T, N>& bits, T (&out)[N]) {
  const bool constant = op.access == Access::kConstant;
  if (!constant && !(M::plain && is_scalar(op))) return decode<M>(op, bits, out);
  const T x = constant ? lit<T>(op.value) : bits.template as<T>();
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = x;
}

template <class S, class T, int N>
__device__ inline Bits<T, N> encode_as(const T (&in)[N]) {
  Chunk<S, N> chunk;
#pragma unroll
  for (int i = 0; i < N; ++i) chunk.item[i] = stored<S>(in[i]);
  return Bits<T, N>::of(chunk);
}

// Nothing where the output is absent.
template <class M, class T, int N>
__device__ inline void write(const Operand& op, const Pack& at, const T (&in)[N]) {
  if (op.access == Access::kConstant) return;
  if constexpr (M::plain) {
    using S = Raw<typename M::S>;
    *plain_address<S, M>(op, at) = encode_as<typename M::S>(in).template as<Chunk<S, N>>();
    return;
  }
  if constexpr (sizeof(T) == 8) {
    if (op.dtype == DType::kDouble) return put_as<T, M, uint64_t>(op, at, encode_as<double>(in));
  }
  if (op.dtype == DType::kFloat) return put_as<T, M, uint32_t>(op, at, encode_as<float>(in));
  put_as<T, M, uint16_t>(op, at, op.dtype == DType::kHalf ? encode_as<__half>(in) : encode_as<__nv_bfloat16>(in));
}

}  // namespace vaefast
