// Lists of types that stand for names: how a likelihood or a parameterisation is found by name or by index.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "problems.h"

namespace vaefast {

template <class... Ts>
struct TypeList {};

template <class... Ts>
std::vector<std::string> names_of(TypeList<Ts...>) {
  return {Ts::name...};
}

template <class T, class... Ts>
constexpr int place_of(TypeList<Ts...>) {
  int place = 0;
  (void)((std::is_same_v<T, Ts> || (++place, false)) || ...);
  return place;
}

namespace detail {

template <class...>
struct Join;
template <class... Ts>
struct Join<TypeList<Ts...>> {
  using type = TypeList<Ts...>;
};
template <class... As, class... Bs, class... Rest>
struct Join<TypeList<As...>, TypeList<Bs...>, Rest...> : Join<TypeList<As..., Bs...>, Rest...> {};

template <class Lists>
struct JoinOf;
template <class... Lists>
struct JoinOf<TypeList<Lists...>> : Join<Lists...> {};

}  // namespace detail

// The list of a list of lists' types.
template <class Lists>
using Joined = typename detail::JoinOf<Lists>::type;

// Stands for the type T as an argument.
template <class T>
struct Tag {
  using type = T;
};

inline namespace VF_ISA {

// f(Tag of the list's type number `index`): what depends on it is decided once, outside the loops in f.
template <class F, class T, class... Rest>
VF_HD auto visit(int index, TypeList<T, Rest...>, const F& f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (index != 0) return visit(index - 1, TypeList<Rest...>{}, f);
  }
  return f(Tag<T>{});
}

template <class... Ts>
constexpr int size_of(TypeList<Ts...>) {
  return sizeof...(Ts);
}

// f(Group, place in it) of the list of lists' type number `index`, the lists one after the other.
template <class F, class Group, class... Rest>
VF_HD auto visit_group(int index, TypeList<Group, Rest...>, const F& f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (index >= size_of(Group{})) return visit_group(index - size_of(Group{}), TypeList<Rest...>{}, f);
  }
  return f(Group{}, index);
}

// f(std::true_type) or f(std::false_type), likewise.
template <class F>
VF_HD auto visit(bool flag, const F& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace VF_ISA

}  // namespace vaefast
