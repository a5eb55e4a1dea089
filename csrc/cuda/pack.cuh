// Packs: the few consecutive elements of the iteration space that a thread handles at once. An operand is read into
// registers as the arithmetic type and written back from there; 16 bytes at a time where it is contiguous and aligned,
// element by element where it is not, so that dtypes and strides cost no extra kernels. No torch types here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "vmath.h"

namespace vaefast {

// 16 bytes of the arithmetic type, and with float a whole Philox counter.
template <class T>
constexpr int kPack = 16 / sizeof(T);

struct Pack {
  const Space& space;
  int64_t start;
  int n;  // elements that exist
};

// The position of an element in the memory of an operand, through its index in every dimension. 32-bit division where
// the size allows it: the 64-bit one is several times as long. Loops stay loops: this is the slow path, and unrolled it
// would be most of the code.
template <class I>
__device__ inline int64_t offset_by_division(const Space& s, const int64_t* stride, int64_t element) {
  int64_t offset = 0;
  I rest = I(element);
#pragma unroll 1
  for (int d = s.ndim - 1; d > 0; --d) {
    const I size = I(s.size[d]), next = rest / size;
    offset += int64_t(rest - next * size) * stride[d];
    rest = next;
  }
  return offset + int64_t(rest) * stride[0];
}

__device__ inline int64_t offset_of(const Space& s, const int64_t* stride, bool linear, int64_t element) {
  if (linear) return element;
  return s.numel <= 0x7fffffff ? offset_by_division<uint32_t>(s, stride, element)
                               : offset_by_division<uint64_t>(s, stride, element);
}

__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }
__device__ inline float load(bool x) { return x ? 1.0f : 0.0f; }
__device__ inline float load(__half x) { return __half2float(x); }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void store(float& to, double x) { to = float(x); }
__device__ inline void store(double& to, double x) { to = x; }
__device__ inline void store(float& to, float x) { to = x; }
__device__ inline void store(double& to, float x) { to = x; }
template <class T>
__device__ inline void store(__half& to, T x) {
  to = __float2half_rn(float(x));
}
template <class T>
__device__ inline void store(__nv_bfloat16& to, T x) {
  to = __float2bfloat16_rn(float(x));
}

// A pack as it lies in memory: 4 to 16 bytes, moved by one instruction.
template <class S, int N>
struct alignas(N * sizeof(S)) Chunk {
  S item[N];
};

__device__ inline int size_of(DType t) {
  return t == DType::kDouble ? 8 : t == DType::kFloat ? 4 : t == DType::kBool ? 1 : 2;
}

// Where the pack can be moved by one instruction, its address; else null. It must be whole, side by side in memory (in
// one run along the last dimension, which has stride 1) and aligned.
template <class T>
__device__ inline char* whole_pack(const Operand& op, const Pack& at) {
  if (at.n != kPack<T>) return nullptr;
  if (!op.linear) {
    const int last = at.space.ndim - 1;
    const int64_t size = at.space.size[last];
    const int64_t column =
        at.space.numel <= 0x7fffffff ? int64_t(uint32_t(at.start) % uint32_t(size)) : at.start % size;
    if (op.stride[last] != 1 || column + at.n > size) return nullptr;
  }
  const int item = size_of(op.dtype);
  char* p = static_cast<char*>(op.data) + offset_of(at.space, op.stride, op.linear, at.start) * item;
  return reinterpret_cast<uintptr_t>(p) % (kPack<T> * item) == 0 ? p : nullptr;
}

template <class T, class S>
__device__ inline void read_whole(const char* from, T (&out)[kPack<T>]) {
  const auto chunk = *reinterpret_cast<const Chunk<S, kPack<T>>*>(from);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) out[i] = T(load(chunk.item[i]));
}

template <class T>
__device__ inline T read_element(const Operand& op, int64_t offset) {
  switch (op.dtype) {
    case DType::kFloat:
      return T(static_cast<const float*>(op.data)[offset]);
    case DType::kDouble:
      return T(static_cast<const double*>(op.data)[offset]);
    case DType::kHalf:
      return T(load(static_cast<const __half*>(op.data)[offset]));
    case DType::kBFloat16:
      return T(load(static_cast<const __nv_bfloat16*>(op.data)[offset]));
    default:
      return T(load(static_cast<const bool*>(op.data)[offset]));
  }
}

template <class T>
__device__ inline void read(const Operand& op, const Pack& at, T (&out)[kPack<T>]) {
  constexpr int N = kPack<T>;
  if (op.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = T(op.value);
    return;
  }
  if (const char* p = whole_pack<T>(op, at)) {
    switch (op.dtype) {
      case DType::kFloat:
        return read_whole<T, float>(p, out);
      case DType::kDouble:
        return read_whole<T, double>(p, out);
      case DType::kHalf:
        return read_whole<T, __half>(p, out);
      case DType::kBFloat16:
        return read_whole<T, __nv_bfloat16>(p, out);
      default:
        return read_whole<T, bool>(p, out);
    }
  }
  // a loop that shifts the elements into place keeps them in registers without being unrolled
#pragma unroll 1
  for (int i = 0; i < N; ++i) {
    const T x = i < at.n ? read_element<T>(op, offset_of(at.space, op.stride, op.linear, at.start + i)) : T(0);
#pragma unroll
    for (int k = 0; k + 1 < N; ++k) out[k] = out[k + 1];
    out[N - 1] = x;
  }
}

template <class T, class S>
__device__ inline void write_whole(char* to, const T (&in)[kPack<T>]) {
  Chunk<S, kPack<T>> chunk;
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) store(chunk.item[i], in[i]);
  *reinterpret_cast<Chunk<S, kPack<T>>*>(to) = chunk;
}

template <class T>
__device__ inline void write_element(const Operand& op, int64_t offset, T x) {
  switch (op.dtype) {
    case DType::kFloat:
      return store(static_cast<float*>(op.data)[offset], x);
    case DType::kDouble:
      return store(static_cast<double*>(op.data)[offset], x);
    case DType::kHalf:
      return store(static_cast<__half*>(op.data)[offset], x);
    default:
      return store(static_cast<__nv_bfloat16*>(op.data)[offset], x);
  }
}

template <class T>
__device__ inline void write(const Operand& op, const Pack& at, const T (&in)[kPack<T>]) {
  constexpr int N = kPack<T>;
  if (op.data == nullptr) return;
  if (char* p = whole_pack<T>(op, at)) {
    switch (op.dtype) {
      case DType::kFloat:
        return write_whole<T, float>(p, in);
      case DType::kDouble:
        return write_whole<T, double>(p, in);
      case DType::kHalf:
        return write_whole<T, __half>(p, in);
      default:
        return write_whole<T, __nv_bfloat16>(p, in);
    }
  }
  T x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = in[i];
#pragma unroll 1
  for (int i = 0; i < at.n; ++i) {
    write_element(op, offset_of(at.space, op.stride, op.linear, at.start + i), x[0]);
#pragma unroll
    for (int k = 0; k + 1 < N; ++k) x[k] = x[k + 1];
  }
}

}  // namespace vaefast
