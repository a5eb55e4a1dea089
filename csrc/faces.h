// An operator is one C++ function whose arguments come in groups. From their fields follow its schema, its kernel as
// the dispatcher and pybind11 call it, flat, and the call of it through the dispatcher.
//
//   A group is a struct whose static fields() says each field's name and place. A field may be a group itself.
//   VF_OPERATOR beside a function's declaration names its arguments that are no groups.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace vaefast {

using at::Tensor;
using MaybeTensor = c10::optional<Tensor>;
using MaybeGenerator = c10::optional<at::Generator>;
using MaybeDouble = c10::optional<double>;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;
using Mask = c10::SmallVector<int64_t, 4>;  // 1 or 0 for each
using Name = c10::string_view;

// Who calls: Python through pybind11, the dispatcher for users, or for the operators below autograd, to which most
// names have become numbers.
enum class Floor { kPython, kUsers, kBelow };

template <class G, class T>
struct Field {
  const char* name;
  T G::* place;
};

template <class G, class T>
constexpr Field<G, T> field(const char* name, T G::* place) {
  return {name, place};
}

template <class T, class = void>
constexpr bool kGroup = false;
template <class T>
constexpr bool kGroup<T, std::void_t<decltype(T::fields())>> = true;

// f(value) for each field, in order.
template <class G, class F>
void for_fields(G& group, const F& f) {
  std::apply([&](const auto&... each) { (f(group.*each.place), ...); }, std::decay_t<G>::fields());
}

// A registry's entry by name or by number; raises where there is none. In ops.cpp for each registry.
template <class E>
E named(Name name);
template <class E>
E numbered(int64_t number);
template <class E>
Name name_of(E e);

// Whether a registry's numbers mean the same in every version: torch.compile keeps what it compiled on disk.
template <class E>
constexpr bool kNumbered = true;

// Tensors that the operator writes over.
struct Written {
  Tensors list;
};

// The type in a schema of what is no group.
template <class T>
constexpr const char* kType = nullptr;
template <>
inline constexpr const char* kType<Tensor> = "Tensor";
template <>
inline constexpr const char* kType<MaybeTensor> = "Tensor?";
template <>
inline constexpr const char* kType<MaybeGenerator> = "Generator?";
template <>
inline constexpr const char* kType<MaybeDouble> = "float?";
template <>
inline constexpr const char* kType<double> = "float";
template <>
inline constexpr const char* kType<int64_t> = "int";
template <>
inline constexpr const char* kType<bool> = "bool";
template <>
inline constexpr const char* kType<Tensors> = "Tensor[]";
template <>
inline constexpr const char* kType<Numbers> = "float[]";
template <>
inline constexpr const char* kType<Mask> = "int[]";
template <>
inline constexpr const char* kType<Written> = "Tensor(a!)[]";

// It, and as it is passed: numbers by value, the rest by reference.
template <class T, Floor F>
struct Plain {
  static constexpr const char* type = kType<T>;
  using Flat = std::conditional_t<std::is_arithmetic_v<T> || std::is_same_v<T, MaybeDouble>, T, const T&>;
  static Flat flat(const T& x) { return x; }
  static void take(T& to, Flat x) { to = x; }
};

// Lists come from Python as such, from the dispatcher as views.
template <class List, class View, Floor F>
struct PlainList {
  static constexpr const char* type = kType<List>;
  using Flat = std::conditional_t<F == Floor::kPython, const List&, View>;
  static Flat flat(const List& list) { return list; }
  static void take(List& to, Flat list) { to = List(list.begin(), list.end()); }
};

template <Floor F>
struct Plain<Tensors, F> : PlainList<Tensors, at::TensorList, F> {};
template <Floor F>
struct Plain<Numbers, F> : PlainList<Numbers, c10::ArrayRef<double>, F> {};
template <Floor F>
struct Plain<Mask, F> : PlainList<Mask, at::IntArrayRef, F> {};
template <Floor F>
struct Plain<Written, F> {
  static constexpr const char* type = kType<Written>;
  using Flat = at::TensorList;
  static Flat flat(const Written& w) { return w.list; }
  static void take(Written& to, Flat list) { to.list = list.vec(); }
};

// A name from a registry.
template <class E, Floor F>
struct PlainName {
  static constexpr bool number = F == Floor::kBelow && kNumbered<E>;
  static constexpr const char* type = number ? "int" : "str";
  using Flat = std::conditional_t<number, int64_t, Name>;
  static Flat flat(E e) {
    if constexpr (number) {
      return int64_t(e);
    } else {
      return name_of(e);
    }
  }
  static void take(E& to, Flat x) {
    if constexpr (number) {
      to = numbered<E>(x);
    } else {
      to = named<E>(x);
    }
  }
};

template <class T, Floor F>
using PlainOf = typename std::conditional_t<std::is_enum_v<T>, PlainName<T, F>, Plain<T, F>>;

namespace face {

template <class... Ts>
struct Types {};

template <class... Ls>
struct Join {
  using type = Types<>;
};
template <class... As>
struct Join<Types<As...>> {
  using type = Types<As...>;
};
template <class... As, class... Bs, class... Rest>
struct Join<Types<As...>, Types<Bs...>, Rest...> : Join<Types<As..., Bs...>, Rest...> {};

template <class T, Floor F, bool GROUP = kGroup<T>>
struct FlatOf {
  using type = Types<typename PlainOf<T, F>::Flat>;
};

template <class Fields, Floor F>
struct FlatOfFields;
template <class G, class... Ts, Floor F>
struct FlatOfFields<std::tuple<Field<G, Ts>...>, F> : Join<typename FlatOf<Ts, F>::type...> {};

template <class T, Floor F>
struct FlatOf<T, F, true> : FlatOfFields<decltype(T::fields()), F> {};

template <class... Ts>
constexpr size_t count(Types<Ts...>) {
  return sizeof...(Ts);
}

template <class T, Floor F>
constexpr size_t kCount = count(typename FlatOf<T, F>::type{});

template <class T>
auto places_of(T& group) {
  return std::apply([&](const auto&... each) { return std::tie(group.*each.place...); }, std::decay_t<T>::fields());
}

template <Floor F, class T>
auto flat(const T& x) {
  if constexpr (kGroup<T>) {
    return std::apply([](const auto&... each) { return std::tuple_cat(flat<F>(each)...); }, places_of(x));
  } else {
    return std::tuple<decltype(PlainOf<T, F>::flat(x))>(PlainOf<T, F>::flat(x));
  }
}

// Fills a tuple from the K-th on with what begins at place AT of the flat arguments.
template <Floor F, size_t AT = 0, size_t K = 0, class Tuple, class Flats>
void take(Tuple&& to, const Flats& flats) {
  if constexpr (K < std::tuple_size_v<std::decay_t<Tuple>>) {
    auto& each = std::get<K>(to);
    using T = std::decay_t<decltype(each)>;
    if constexpr (kGroup<T>) {
      take<F, AT>(places_of(each), flats);
    } else {
      PlainOf<T, F>::take(each, std::get<AT>(flats));
    }
    take<F, AT + kCount<T, F>, K + 1>(to, flats);
  }
}

template <Floor F, class G, class... Ts>
void add_fields(std::string& schema, const std::tuple<Field<G, Ts>...>& fields);

// Adds an argument to a schema; a group's go by their own names.
template <Floor F, class T>
void add_to(std::string& schema, const char* name) {
  if constexpr (kGroup<T>) {
    add_fields<F>(schema, T::fields());
  } else {
    schema += std::string(schema.back() == '(' ? "" : ", ") + PlainOf<T, F>::type + " " + name;
  }
}

template <Floor F, class G, class... Ts>
void add_fields(std::string& schema, const std::tuple<Field<G, Ts>...>& fields) {
  std::apply([&](const auto&... each) { (add_to<F, Ts>(schema, each.name), ...); }, fields);
}

template <class R>
constexpr const char* kResult = kType<R>;
template <>
inline constexpr const char* kResult<void> = "()";
template <>
inline constexpr const char* kResult<std::tuple<Tensor, Tensor, Tensor>> = "(Tensor, Tensor, Tensor)";

template <Floor F, auto f, class R, class Args, class Flats>
struct FaceOf;
template <Floor F, auto f, class R, class... As, class... Flats>
struct FaceOf<F, f, R, Types<As...>, Types<Flats...>> {
  static R call(Flats... flats) {
    std::tuple<As...> args;
    take<F>(args, std::forward_as_tuple(flats...));
    return std::apply(f, args);
  }

  // of an operator called `name`, of whose arguments those that are no groups have `names`
  static std::string schema(const std::string& name, std::initializer_list<const char*> names) {
    std::string text = name + "(";
    auto next = names.begin();
    (add_to<F, As>(text, kGroup<As> ? nullptr : *next++), ...);
    return text + ") -> " + kResult<R>;
  }
};

template <Floor F, auto f, class Function>
struct FaceFor;
template <Floor F, auto f, class R, class... As>
struct FaceFor<F, f, R (*)(As...)>
    : FaceOf<F, f, R, Types<std::decay_t<As>...>, typename Join<typename FlatOf<std::decay_t<As>, F>::type...>::type> {
};

}  // namespace face

// The operator f: its name, and the names of its arguments that are no groups.
template <auto f>
struct Operator;

#define VF_OPERATOR(f, ...)                                                  \
  template <>                                                                \
  struct Operator<f> {                                                       \
    static constexpr const char* name = #f;                                  \
    static std::initializer_list<const char*> names() {                      \
      static constexpr std::initializer_list<const char*> list{__VA_ARGS__}; \
      return list;                                                           \
    }                                                                        \
  }

template <Floor F, auto f>
struct Face : face::FaceFor<F, f, decltype(f)> {
  static std::string schema(const char* prefix = "") {
    return face::FaceFor<F, f, decltype(f)>::schema(std::string(prefix) + Operator<f>::name, Operator<f>::names());
  }
};

// The kernel of the operator f below autograd, or of one that has f's schema and a prefix to its name, as the
// dispatcher finds it.
template <auto f>
auto find(const char* prefix = "") {
  const std::string name = std::string("vaefast::") + prefix + Operator<f>::name;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name.c_str(), "")
      .typed<std::remove_pointer_t<decltype(&Face<Floor::kBelow, f>::call)>>();
}

namespace face {

template <auto f, class Function>
struct Dispatched;
template <auto f, class R, class... As>
struct Dispatched<f, R (*)(As...)> {
  static R call(As... args) {
    static const auto op = find<f>();
    return std::apply([](const auto&... flats) -> R { return op.call(flats...); },
                      std::tuple_cat(flat<Floor::kBelow>(args)...));
  }
};

}  // namespace face

// f through the dispatcher, so that modes and tensor subclasses see it.
template <auto f>
constexpr auto dispatched = face::Dispatched<f, decltype(f)>::call;

}  // namespace vaefast
