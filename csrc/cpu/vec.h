// vmath.h's primitives for at::vec::Vectorized.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace vaefast {
inline namespace VF_ISA {

template <class T>
using Vec = at::vec::Vectorized<T>;

template <class T>
struct Lane<Vec<T>> {
  using type = T;
};

template <class T>
VF_HD Vec<T> log_(Vec<T> x) {
  return x.log();
}
template <class T>
VF_HD Vec<T> sqrt_(Vec<T> x) {
  return x.sqrt();
}
template <class T>
VF_HD Vec<T> abs_(Vec<T> x) {
  return x.abs();
}
template <class T>
VF_HD Vec<T> reciprocal(Vec<T> x) {
  return Vec<T>(T(1)) / x;
}
template <class T>
VF_HD Vec<T> rint_(Vec<T> x) {
  return x.round();
}
template <class T>
VF_HD Vec<T> fma_(Vec<T> a, Vec<T> b, Vec<T> c) {
  return at::vec::fmadd(a, b, c);
}
template <class T>
VF_HD Vec<T> select(Vec<T> mask, Vec<T> a, Vec<T> b) {
  return Vec<T>::blendv(b, a, mask);
}

}  // namespace VF_ISA
}  // namespace vaefast
