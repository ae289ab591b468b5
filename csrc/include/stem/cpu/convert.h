// Rows of float32, float16 or bfloat16 to float32 and back, rounding to the nearest even. Integer
// arithmetic without branches, which compilers turn into vectors on every CPU; for float16 by the
// CPU's own conversion, eight at a time, where it has one.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace stem::cpu::STEM_ISA {

STEM_INLINE float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

STEM_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

STEM_INLINE float float_of_half(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  // The exponent's bias is 15 in a half and 127 in a float; infinity and NaN keep all ones.
  const uint32_t rebiased = magnitude + ((127 - 15) << 23);
  const uint32_t special = magnitude + ((255 - 31) << 23);
  // A denormal half is a multiple of 2^-24: put it under 2^-14's leading one, then take that away.
  const float denormal = float_of_bits(magnitude + ((127 - 14) << 23)) - float_of_bits(113 << 23);
  const uint32_t bits = magnitude >= (31u << 23)  ? special
                        : magnitude < (1u << 23) ? bits_of_float(denormal)
                                                 : rebiased;
  return float_of_bits(bits | sign);
}

STEM_INLINE uint16_t half_of_float(float value) {
  const uint32_t sign = bits_of_float(value) & 0x80000000u;
  const uint32_t magnitude = bits_of_float(value) & 0x7fffffffu;
  const uint32_t odd = (magnitude >> 13) & 1;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + odd) >> 13;
  // Adding 1/2 leaves the multiple of 2^-24, rounded, in the low bits.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - (126u << 23);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= (143u << 23)  ? special
                        : magnitude < (113u << 23) ? denormal
                                                   : normal;
  return static_cast<uint16_t>(half | (sign >> 16));
}

STEM_INLINE uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

// Row `index` of source -> to [count].
static void load_row(const Rows& source, int64_t index, int64_t count, float* __restrict to) {
  const int64_t offset = index * source.stride;
  if (source.dtype == DType::kFloat) {
    const float* from = static_cast<const float*>(source.data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else if (source.dtype == DType::kHalf) {
    const uint16_t* from = static_cast<const uint16_t*>(source.data) + offset;
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(
          to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; ++i) to[i] = float_of_half(from[i]);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(source.data) + offset;
    for (int64_t i = 0; i < count; ++i)
      to[i] = float_of_bits(static_cast<uint32_t>(from[i]) << 16);
  }
}

// from [count] -> element `offset` and on of an array of dtype.
static void store_row(const float* __restrict from, int64_t count, DType dtype, void* to,
                      int64_t offset) {
  if (dtype == DType::kFloat) {
    float* row = static_cast<float*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) row[i] = from[i];
  } else if (dtype == DType::kHalf) {
    uint16_t* row = static_cast<uint16_t*>(to) + offset;
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) row[i] = half_of_float(from[i]);
  } else {
    uint16_t* row = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; ++i) row[i] = bfloat16_of_float(from[i]);
  }
}

}  // namespace stem::cpu::STEM_ISA
