// exp_ and log_unit for at::vec::Vectorized, built on vmath.h's series.
#pragma once

#include "cpu/vec.h"

namespace vaefast {
inline namespace VF_ISA {

using Floats = Vec<float>;
using Ints = Vec<int32_t>;

VF_HD Ints bits_of(Floats x) { return at::vec::cast<int32_t>(x); }
VF_HD Floats floats_of(Ints x) { return at::vec::cast<float>(x); }

VF_HD Vec<double> exp_(Vec<double> x) { return x.exp(); }

// Inline: a library call would spill every register around it. x = n log 2 + r with |r| <= log(2) / 2, e^r by its
// series to r^7 / 7!, then 2^n in two steps, so that overflow and gradual underflow come out by themselves. Within 1
// ulp.
VF_HD Floats exp_(Floats x) {
  // ordered so that a NaN passes
  const Floats c = at::vec::clamp(x, Floats(-106.0f), Floats(90.0f));
  const Floats n = (c * Floats(1.44269504088896340736f)).round();
  const Floats r = at::vec::fmadd(n, Floats(2.12194440e-4f), at::vec::fmadd(n, Floats(-0.693359375f), c));
  const Ints i = at::vec::convert_to_int_of_same_size(n), half = i >> Ints(1);
  const Floats low = floats_of((half + Ints(127)) << Ints(23)), high = floats_of((i - half + Ints(127)) << Ints(23));
  return exp_tail<0, 7>(r) * low * high;
}

VF_HD Vec<double> log_unit(Vec<double> x) { return x.log(); }

// x = m 2^e with m in [sqrt(1/2), sqrt(2)): log x = e log 2 + 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172
VF_HD Floats log_unit(Floats x) {
  const Ints offset(0x3f3504f3), i = bits_of(x) - offset, e = i >> Ints(23);
  const Floats m = floats_of(bits_of(x) - (e << Ints(23)));
  const Floats s = (m - Floats(1.0f)) / (m + Floats(1.0f)), y = s * s;
  const Floats atanh2 = (s + s) * at::vec::fmadd(atanh_tail<1, 4>(y), y, Floats(1.0f));
  return at::vec::fmadd(at::vec::convert_to_fp_of_same_size<float>(e), Floats(0.693147180559945f), atanh2);
}

}  // namespace VF_ISA
}  // namespace vaefast
