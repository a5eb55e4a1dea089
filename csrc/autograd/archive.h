// What an autograd node keeps for backward: forward puts tensors, numbers and groups of them in, backward takes them
// out in the same order.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "arguments.h"

namespace vaefast {

template <class T>
constexpr bool kNumber = std::is_arithmetic_v<T> || std::is_enum_v<T>;

class Archive {
 public:
  template <class T>
  Archive& put(const T& x) {
    if constexpr (kNumber<T>) {
      numbers_.push_back(double(x));
    } else if constexpr (kGroup<T>) {
      for_fields(x, [&](const auto& each) { put(each); });
    } else if constexpr (std::is_same_v<T, Tensor>) {
      // An undefined tensor takes no place among the saved ones: with a few more of them, a small loss's no longer fit
      // in what malloc has at hand.
      put(x.defined());
      if (x.defined()) tensors_.push_back(x);
    } else if constexpr (std::is_same_v<T, MaybeTensor>) {
      put(x ? *x : Tensor());
    } else if constexpr (std::is_same_v<T, MaybeDouble>) {
      put(x.has_value());
      if (x) put(*x);
    } else {
      put(x.size());
      for (const auto& each : x) put(each);
    }
    return *this;
  }

  void keep(torch::autograd::AutogradContext* ctx) {
    ctx->save_for_backward(std::move(tensors_));
    ctx->saved_data["numbers"] = std::move(numbers_);
  }

 private:
  Tensors tensors_;
  Numbers numbers_;
};

class Archived {
 public:
  explicit Archived(torch::autograd::AutogradContext* ctx)
      : tensors_(ctx->get_saved_variables()), numbers_(ctx->saved_data["numbers"].toDoubleVector()) {}

  template <class T>
  T take() {
    T x{};
    take(x);
    return x;
  }

 private:
  template <class T>
  void take(T& x) {
    if constexpr (kNumber<T>) {
      x = T(numbers_.at(number_++));
    } else if constexpr (kGroup<T>) {
      for_fields(x, [&](auto& each) { take(each); });
    } else if constexpr (std::is_same_v<T, Tensor> || std::is_same_v<T, MaybeTensor>) {
      if (take<bool>()) x = std::move(tensors_.at(tensor_++));
    } else if constexpr (std::is_same_v<T, MaybeDouble>) {
      if (take<bool>()) x = take<double>();
    } else {
      x.resize(take<size_t>());
      for (auto& each : x) take(each);
    }
  }

  Tensors tensors_;
  Numbers numbers_;
  size_t tensor_ = 0, number_ = 0;
};

}  // namespace vaefast
