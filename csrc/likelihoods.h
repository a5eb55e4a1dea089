// The likelihoods, by groups that are compiled apart: a new one is a struct in its group's file and that file's list,
// and an entry in vaefast/likelihoods.py.
#pragma once

#include "likelihoods/binary.h"
#include "likelihoods/compound.h"
#include "likelihoods/counts.h"
#include "likelihoods/discrete.h"
#include "likelihoods/positive.h"
#include "likelihoods/real.h"

namespace vaefast {
inline namespace VF_ISA {

using LikelihoodGroups = TypeList<BinaryLikelihoods, RealLikelihoods, PositiveLikelihoods, CountLikelihoods,
                                  CompoundLikelihoods, DiscreteLikelihoods>;
using Likelihoods = Joined<LikelihoodGroups>;

}  // namespace VF_ISA
}  // namespace vaefast
