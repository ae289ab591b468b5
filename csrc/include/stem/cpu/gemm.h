// The one product that all operators are made of: c [rows, kPanel] (+)= a [rows, depth] b, or of
// the left half of b and c alone.
#pragma once

#include "vec.h"

namespace stem::cpu::STEM_ISA {

// Channels of a product of tokens that are summed in one go. Sums of sums round less than one long
// sum: the error of logits in the hundreds shows. It also keeps a panel's part in the first cache.
constexpr int64_t kChunk = 48;

// kByStep: the Rows numbers of a step lie side by side, steps a_stride apart; else row i of a starts
// at a + i * a_stride.
// All 2 * Rows accumulators stay in registers: each step of depth costs 2 + Rows loads for
// 2 * Rows multiply-adds, under the two loads a cycle that x86 has for its two multiply-adds.
// The sum over depth is complete before c is added, so that cutting depth in parts loses nothing.
template <int Rows, bool kByStep, bool kLeft>
static void multiply_block(int64_t depth, const float* a, int64_t a_stride, const float* b,
                           float* c, bool add) {
  Vec left[Rows], right[Rows];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    left[i] = Vec{};
    right[i] = Vec{};
  }
  for (int64_t step = 0; step < depth; ++step) {
    const Vec b_left = load(b), b_right = kLeft ? Vec{} : load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec factor = broadcast(kByStep ? a[i] : a[i * a_stride]);
      left[i] += factor * b_left;
      if (!kLeft) right[i] += factor * b_right;
    }
    a += kByStep ? a_stride : 1;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    float* row = c + i * kPanel;
    store(row, add ? load(row) + left[i] : left[i]);
    if (!kLeft) store(row + kLanes, add ? load(row + kLanes) + right[i] : right[i]);
  }
}

template <int Rows, bool kByStep, bool kLeft = false>
static void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                          const float* b, float* c, bool add) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      multiply_block<Rows, kByStep, kLeft>(depth, a, a_stride, b, c, add);
    else
      multiply_rows<Rows - 1, kByStep, kLeft>(rows, depth, a, a_stride, b, c, add);
  }
}

// Rows are cut evenly into as few blocks as kRows allows: 41 into 13 + 14 + 14.
STEM_INLINE int64_t num_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
STEM_INLINE int64_t block_start(int64_t rows, int64_t block) {
  return rows * block / num_blocks(rows);
}

// a: rows of floats, a_stride apart. b: [depth, kPanel]. c: [rows, kPanel].
template <bool kLeft = false>
static void multiply_strided(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                             const float* b, float* c, bool add) {
  for (int64_t block = 0; block < num_blocks(rows); ++block) {
    const int64_t first = block_start(rows, block);
    multiply_rows<kRows, false, kLeft>(block_start(rows, block + 1) - first, depth,
                                       a + first * a_stride, a_stride, b, c + first * kPanel, add);
  }
}

// a: from pack or pack_transposed, with the same rows and depth.
static void multiply_packed(int64_t rows, int64_t depth, const float* a, const float* b, float* c,
                            bool add) {
  for (int64_t block = 0; block < num_blocks(rows); ++block) {
    const int64_t first = block_start(rows, block);
    const int64_t count = block_start(rows, block + 1) - first;
    multiply_rows<kRows, true>(count, depth, a + first * depth, count, b, c + first * kPanel, add);
  }
}

// a: [depth, rows], its steps a_stride apart.
template <bool kLeft = false>
static void multiply_transposed(int64_t rows, int64_t depth, const float* a, int64_t a_stride,
                                const float* b, float* c, bool add) {
  for (int64_t block = 0; block < num_blocks(rows); ++block) {
    const int64_t first = block_start(rows, block);
    multiply_rows<kRows, true, kLeft>(block_start(rows, block + 1) - first, depth, a + first,
                                      a_stride, b, c + first * kPanel, add);
  }
}

// source [depth, rows], rows of it source_stride apart, each times its factor -> blocks
// [depth, rows of the block].
static void pack(int64_t rows, int64_t depth, const float* source, int64_t source_stride,
                 const float* factors, float* packed) {
  for (int64_t block = 0; block < num_blocks(rows); ++block) {
    const int64_t first = block_start(rows, block), count = block_start(rows, block + 1) - first;
    for (int64_t step = 0; step < depth; ++step) {
      const float* from = source + step * source_stride + first;
      for (int64_t i = 0; i < count; ++i) *packed++ = from[i] * factors[step];
    }
  }
}

}  // namespace stem::cpu::STEM_ISA
