// What an autograd node keeps for backward: forward puts tensors and numbers in, backward takes them out in the same
// order.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "compute.h"

namespace vaefast {

class Archive {
 public:
  Archive& put(double number) {
    numbers_.push_back(number);
    return *this;
  }
  // An undefined tensor takes no place among the saved ones: with a few more of them, a small loss's no longer fit in
  // what malloc has at hand.
  Archive& put(const Tensor& t) {
    put(double(t.defined()));
    if (t.defined()) tensors_.push_back(t);
    return *this;
  }
  Archive& put(const MaybeTensor& t) { return put(t ? *t : Tensor()); }
  template <class T>
  Archive& put(const std::vector<T>& list) {
    put(double(list.size()));
    for (const auto& entry : list) put(entry);
    return *this;
  }
  Archive& put(const Mask& mask) {
    put(double(mask.size()));
    for (bool flag : mask) put(double(flag));
    return *this;
  }
  Archive& put(const PosteriorSpec& spec) { return put(spec.pack()); }
  Archive& put(const PackedSpec& spec) { return put(spec.pack()); }
  Archive& put(const ReconstructionSpec& spec) {
    return put(double(spec.likelihood)).put(spec.options).put(double(int(spec.reduction)));
  }
  Archive& put(const PosteriorInputs& in) {
    return put(in.mu).put(in.raw).put(in.prior_mu).put(in.prior_logvar).put(in.eps).put(in.seed);
  }
  Archive& put(const PackedInputs& in) { return put(in.moments).put(in.prior).put(in.seed); }
  Archive& put(const MultiInputs& in) {
    return put(in.mus).put(in.raws).put(in.prior_mus).put(in.prior_logvars).put(in.seed);
  }
  Archive& put(const ReconstructionInputs& in) { return put(in.params).put(in.target).put(in.weight); }

  void keep(torch::autograd::AutogradContext* ctx) {
    ctx->save_for_backward(std::move(tensors_));
    ctx->saved_data["numbers"] = std::move(numbers_);
  }

 private:
  Tensors tensors_;
  std::vector<double> numbers_;
};

class Archived {
 public:
  explicit Archived(torch::autograd::AutogradContext* ctx)
      : tensors_(ctx->get_saved_variables()), numbers_(ctx->saved_data["numbers"].toDoubleVector()) {}

  template <class T>
  T take() {
    T t;
    take(t);
    return t;
  }

 private:
  double number() { return numbers_.at(number_++); }

  void take(double& number) { number = this->number(); }
  void take(bool& flag) { flag = number() != 0; }
  void take(int64_t& count) { count = int64_t(number()); }
  void take(Tensor& t) {
    if (take<bool>()) t = std::move(tensors_.at(tensor_++));
  }
  void take(MaybeTensor& t) {
    if (take<bool>()) t = std::move(tensors_.at(tensor_++));
  }
  template <class T>
  void take(std::vector<T>& list) {
    list.resize(take<int64_t>());
    for (size_t k = 0; k < list.size(); ++k) list[k] = take<T>();
  }
  void take(PosteriorSpec& spec) { spec = PosteriorSpec::unpack(take<std::vector<double>>()); }
  void take(PackedSpec& spec) { spec = PackedSpec::unpack(take<std::vector<double>>()); }
  void take(ReconstructionSpec& spec) {
    take(spec.likelihood), take(spec.options), spec.reduction = Reduction(take<int64_t>());
  }
  void take(PosteriorInputs& in) {
    take(in.mu), take(in.raw), take(in.prior_mu), take(in.prior_logvar), take(in.eps), take(in.seed);
  }
  void take(PackedInputs& in) { take(in.moments), take(in.prior), take(in.seed); }
  void take(MultiInputs& in) { take(in.mus), take(in.raws), take(in.prior_mus), take(in.prior_logvars), take(in.seed); }
  void take(ReconstructionInputs& in) { take(in.params), take(in.target), take(in.weight); }

  Tensors tensors_;
  std::vector<double> numbers_;
  size_t tensor_ = 0, number_ = 0;
};

}  // namespace vaefast
