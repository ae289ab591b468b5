// Vectors in the compiler's own vector types (GCC, Clang), so that one source serves every
// instruction set. A kernel file is compiled once for each, with STEM_ISA (a name) and STEM_LANES
// (floats in a register) defined; the namespace keeps the copies apart. For the same reason no
// standard library function is called in these headers: the linker keeps one copy of an inline
// function, and it might be one that this CPU cannot run.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#define STEM_INLINE static inline __attribute__((always_inline))

namespace stem::cpu::STEM_ISA {

constexpr int kLanes = STEM_LANES;
// Everything that the micro-kernel reads by vectors is laid out in panels of two of them.
constexpr int kPanel = 2 * kLanes;
// Rows of the micro-kernel's block: two accumulators each, one vector of a, two of b.
constexpr int kRows = STEM_LANES == 16 ? 14 : 6;

typedef float Vec __attribute__((vector_size(4 * STEM_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * STEM_LANES)));
typedef uint32_t UintVec __attribute__((vector_size(4 * STEM_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * STEM_LANES), aligned(4), may_alias));

STEM_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
STEM_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
STEM_INLINE Vec broadcast(float x) { return x - Vec{}; }  // not x + 0, which makes 0 of -0
// b where either is NaN. Compilers make a comparison and a blend of the general form.
STEM_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

alignas(64) static const int32_t kLaneIndices[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};

// Lane i of the result is lane i ^ distance of v.
STEM_INLINE Vec swap_lanes(Vec v, int distance) {
#if defined(__clang__)
  Vec swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = v[i ^ distance];
  return swapped;
#else
  return __builtin_shuffle(v, *reinterpret_cast<const IntVec*>(kLaneIndices) ^ distance);
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

// Bit i: whether lane i is not 0; NaN is not.
STEM_INLINE uint32_t lanes_not_zero(Vec v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, Vec{}, _CMP_NEQ_UQ);
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, Vec{}, _CMP_NEQ_UQ));
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_cmpneq_ps(v, Vec{}));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t{v[lane] != 0.0f} << lane;
  return bits;
#endif
}

STEM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace stem::cpu::STEM_ISA
