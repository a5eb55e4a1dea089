#include "likelihoods/registries.h"

#include "likelihoods.h"
#include "posterior.h"

namespace vaefast {

namespace {

template <class L>
Traits traits_of() {
  static_assert(L::params <= kMaxParams && kOptions<L> <= kMaxOptions);
  Traits t{L::required, L::params, kOptions<L>, {}, nullptr};
  if constexpr (kMixture<L>) {
    t.channels = channels_of(typename L::Channels{});
    t.params_of = L::params_of;
  }
  return t;
}

template <class... Ls>
std::vector<Traits> traits_of_all(TypeList<Ls...>) {
  return {traits_of<Ls>()...};
}

}  // namespace

const std::vector<Traits>& likelihood_traits() {
  static const std::vector<Traits> traits = traits_of_all(Likelihoods{});
  return traits;
}

const std::vector<std::string>& likelihood_names() {
  static const std::vector<std::string> names = names_of(Likelihoods{});
  return names;
}

const std::vector<std::string>& parameterization_names() {
  static const std::vector<std::string> names = names_of(Parameterizations{});
  return names;
}

}  // namespace vaefast
