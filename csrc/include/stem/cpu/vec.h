// Vectors in the compiler's own vector types (GCC, Clang), so that one source serves every
// instruction set. A kernel file is compiled once for each, with STEM_ISA (a name) and STEM_LANES
// (floats in a register) defined; the namespace keeps the copies apart. For the same reason no
// standard library function is called in these headers: the linker keeps one copy of an inline
// function, and it might be one that this CPU cannot run.
#pragma once

#include <cstdint>

#define STEM_INLINE static inline __attribute__((always_inline))

namespace stem::cpu::STEM_ISA {

constexpr int kLanes = STEM_LANES;
// Everything that the micro-kernel reads by vectors is laid out in panels of two of them.
constexpr int kPanel = 2 * kLanes;
// Rows of the micro-kernel's block: two accumulators each, one vector of a, two of b.
constexpr int kRows = STEM_LANES == 16 ? 14 : 6;

typedef float Vec __attribute__((vector_size(4 * STEM_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * STEM_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * STEM_LANES), aligned(4), may_alias));

STEM_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
STEM_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
STEM_INLINE Vec broadcast(float x) { return x - Vec{}; }  // not x + 0, which makes 0 of -0
STEM_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// Lane i of the result is lane i ^ distance of v.
STEM_INLINE Vec swap_lanes(Vec v, int distance) {
#if defined(__clang__)
  Vec swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ distance];
  return swapped;
#else
  IntVec from;
  for (int i = 0; i < kLanes; ++i) from[i] = i ^ distance;
  return __builtin_shuffle(v, from);
#endif
}

STEM_INLINE float largest_lane(Vec v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    v = larger(v, swap_lanes(v, distance));
  return v[0];
}

STEM_INLINE float sum_of_lanes(Vec v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += swap_lanes(v, distance);
  return v[0];
}

STEM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace stem::cpu::STEM_ISA
