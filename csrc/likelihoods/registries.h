// What the operators know of the registries, whose functors they do not compile.
#pragma once

#include <string>
#include <vector>

namespace vaefast {

// What is known of a likelihood from its struct.
struct Traits {
  int required, params, options;
  std::vector<int> channels;  // a mixture's
  int (*params_of)(int channels);

  bool mixture() const { return !channels.empty(); }
};

const std::vector<Traits>& likelihood_traits();
const std::vector<std::string>& likelihood_names();
const std::vector<std::string>& parameterization_names();

}  // namespace vaefast
