// 2^t for the weights of a softmax, whose largest exponent is 0.
#pragma once

#include "vec.h"

namespace stem::cpu::STEM_ISA {

// A weight of 2^-100 of the largest counts for nothing, and above it nothing is denormal, which
// CPUs are slow at.
constexpr float kNegligible = -100.0f;

// t <= 0 or NaN. Relative error under 1.3e-7; exactly 1 at 0, and 0 below kNegligible.
// The nearest integer is split off by adding 1.5 * 2^23, which leaves it in the low bits; 2^f on
// [-1/2, 1/2] is a polynomial of degree 6 with a relative error of 2.1e-9, from a linear program
// over 801 Chebyshev points that holds p(0) = 1.
STEM_INLINE Vec exp2_of_nonpositive(Vec t) {
  constexpr float kRound = 12582912.0f;
  const Vec shifted = t + kRound;
  const Vec f = t - (shifted - kRound);
  Vec p = f * 1.5352255e-4f + 1.33989007e-3f;
  p = p * f + 9.61844326e-3f;
  p = p * f + 5.55033250e-2f;
  p = p * f + 2.40226478e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
  // Unsigned, because bits are shifted out of it.
  const UintVec exponent = reinterpret_cast<UintVec>(shifted) << 23;
  const Vec scale = reinterpret_cast<Vec>(exponent + (127u << 23));
  return t < kNegligible ? Vec{} : p * scale;
}

}  // namespace stem::cpu::STEM_ISA
