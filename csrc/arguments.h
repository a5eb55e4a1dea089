// The groups that operators' arguments come in: each field with its name in the schemas, once.
#pragma once

#include "faces.h"
#include "problems.h"

namespace vaefast {

// Places in the lists of likelihoods.h and posterior.h. The former changes its order as it grows.
enum class LikelihoodIndex : int32_t {};
enum class ParameterizationIndex : int32_t {};
template <>
inline constexpr bool kNumbered<LikelihoodIndex> = false;

// q and, as tensors or numbers, the p that a KL is taken against.
struct PosteriorInputs {
  Tensor mu, raw;  // [B, ...]
  MaybeTensor prior_mu;
  double prior_mu_value = 0;
  MaybeTensor prior_logvar;
  double prior_logvar_value = 0;

  static constexpr auto fields() {
    using P = PosteriorInputs;
    return std::make_tuple(field("mu", &P::mu), field("raw", &P::raw), field("prior_mu", &P::prior_mu),
                           field("prior_mu_value", &P::prior_mu_value), field("prior_logvar", &P::prior_logvar),
                           field("prior_logvar_value", &P::prior_logvar_value));
  }
};

// The caller's noise, or the seed and counter that it was drawn from.
struct Noise {
  MaybeTensor eps;   // as mu
  MaybeTensor seed;  // [2], int64

  static constexpr auto fields() { return std::make_tuple(field("eps", &Noise::eps), field("seed", &Noise::seed)); }
};

// Posteriors by the list; of priors there are as many, or none.
struct MultiInputs {
  Tensors mus, raws, prior_mus;
  double prior_mu = 0;
  Tensors prior_logvars;
  double prior_logvar = 0;

  static constexpr auto fields() {
    using M = MultiInputs;
    return std::make_tuple(field("mus", &M::mus), field("raws", &M::raws), field("prior_mus", &M::prior_mus),
                           field("prior_mu", &M::prior_mu), field("prior_logvars", &M::prior_logvars),
                           field("prior_logvar", &M::prior_logvar));
  }
};

// Mean and log variance in the halves of one tensor along dim, a posterior's and a prior's of the same shape.
struct PackedInputs {
  Tensor moments;
  int64_t dim = 1;
  MaybeTensor prior;
  double prior_lo = 0, prior_hi = 0;  // the clamp of the prior's log variance

  static constexpr auto fields() {
    using P = PackedInputs;
    return std::make_tuple(field("moments", &P::moments), field("dim", &P::dim), field("prior", &P::prior),
                           field("prior_lo", &P::prior_lo), field("prior_hi", &P::prior_hi));
  }
};

struct Parameterization {
  ParameterizationIndex kind{};
  double lo = 0, hi = 0, floor = 0;

  static constexpr auto fields() {
    using P = Parameterization;
    return std::make_tuple(field("parameterization", &P::kind), field("lo", &P::lo), field("hi", &P::hi),
                           field("floor", &P::floor));
  }
};

// How a loss's elements are reduced.
struct Reduced {
  Reduction kind = Reduction::kNone;

  static constexpr auto fields() { return std::make_tuple(field("reduction", &Reduced::kind)); }
};

// Everything about a posterior that is no tensor.
struct PosteriorSpec {
  Parameterization parameterization;
  Reduced reduced;
  // alpha, where the KL's gradient is alpha times the prior's and 1 - alpha times the posterior's
  MaybeDouble balance;

  static constexpr auto fields() {
    using P = PosteriorSpec;
    return std::make_tuple(field("", &P::parameterization), field("", &P::reduced), field("balance", &P::balance));
  }
};

// What a posterior's operator is asked for.
struct Asked {
  bool sample = false, kl = false;

  size_t outputs() const { return size_t(sample) + size_t(kl); }

  static constexpr auto fields() { return std::make_tuple(field("sample", &Asked::sample), field("kl", &Asked::kl)); }
};

struct ReconstructionInputs {
  Tensors params;      // [B, ...] each, or what broadcasts to the first
  Tensor target;       // [B, ...]
  MaybeTensor weight;  // broadcasts to the loss's elements
  LikelihoodIndex likelihood{};
  Numbers options;

  static constexpr auto fields() {
    using R = ReconstructionInputs;
    return std::make_tuple(field("params", &R::params), field("target", &R::target), field("weight", &R::weight),
                           field("likelihood", &R::likelihood), field("options", &R::options));
  }
};

// Logits with classes along dim, and the prior's of the same shape, where it is not uniform; of both the share unimix
// is made uniform. And how the sites' KLs are reduced.
struct CategoricalInputs {
  Tensor logits;
  MaybeTensor prior;
  int64_t dim = -1;
  double unimix = 0;
  Reduced reduced;
  MaybeDouble balance;  // as PosteriorSpec's

  static constexpr auto fields() {
    using C = CategoricalInputs;
    return std::make_tuple(field("logits", &C::logits), field("prior", &C::prior), field("dim", &C::dim),
                           field("unimix", &C::unimix), field("", &C::reduced), field("balance", &C::balance));
  }
};

// Draws z [K, B, ...] of a posterior [B, ...], and what broadcasts to that or a number of the prior, if there is one.
struct LogRatioInputs {
  Tensor z, mu, logvar;
  MaybeTensor prior_mu;
  double prior_mu_value = 0;
  MaybeTensor prior_logvar;
  double prior_logvar_value = 0;
  bool prior = true;

  static constexpr auto fields() {
    using L = LogRatioInputs;
    return std::make_tuple(field("z", &L::z), field("mu", &L::mu), field("logvar", &L::logvar),
                           field("prior_mu", &L::prior_mu), field("prior_mu_value", &L::prior_mu_value),
                           field("prior_logvar", &L::prior_logvar), field("prior_logvar_value", &L::prior_logvar_value),
                           field("prior", &L::prior));
  }
};

// Experts [M, B, ...], which of them there are, [M, B, ...] with any last dimensions left out and 1 in any's place, and
// whether N(0, I) is one too.
struct ExpertsInputs {
  Tensor mus, logvars;
  MaybeTensor there;
  bool prior = true;

  static constexpr auto fields() {
    using E = ExpertsInputs;
    return std::make_tuple(field("mus", &E::mus), field("logvars", &E::logvars), field("there", &E::there),
                           field("prior", &E::prior));
  }
};

// What the marginals of a batch's aggregate posterior are made of; MarginalsProblem says what each is.
struct MarginalsInputs {
  Tensor z, mu, slope, constant;  // [D, B]
  Tensors columns, logs;          // none, or two of [B]

  static constexpr auto fields() {
    using M = MarginalsInputs;
    return std::make_tuple(field("z", &M::z), field("mu", &M::mu), field("slope", &M::slope),
                           field("constant", &M::constant), field("columns", &M::columns), field("logs", &M::logs));
  }
};

// z [B, D] under a mixture of components [K, D], whose log weights are [K], up to a constant, or alike.
struct MixtureInputs {
  Tensor z, mus, logvars;
  MaybeTensor logits;

  static constexpr auto fields() {
    using M = MixtureInputs;
    return std::make_tuple(field("z", &M::z), field("mus", &M::mus), field("logvars", &M::logvars),
                           field("logits", &M::logits));
  }
};

// The numbers of a step of IVON's.
struct IvonStep : IvonNumbers {
  static constexpr auto fields() {
    using N = IvonNumbers;
    return std::make_tuple(field("ess", &N::ess), field("weight_decay", &N::weight_decay), field("beta1", &N::beta1),
                           field("beta2", &N::beta2), field("unbias", &N::unbias), field("rate", &N::rate),
                           field("clip_radius", &N::clip_radius));
  }
};

}  // namespace vaefast
