// Lists of types that stand for names: how a likelihood or a parameterisation is found by name or by index.
#pragma once

#include <string>
#include <vector>

#include "common.h"

namespace vaefast {

template <class... Ts>
struct TypeList {};

template <class... Ts>
std::vector<std::string> names_of(TypeList<Ts...>) {
  return {Ts::name...};
}

}  // namespace vaefast
