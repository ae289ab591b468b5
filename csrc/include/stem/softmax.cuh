// The softmax over bases of logits that lie as [bases, tokens] over the warps of a block.
#pragma once

#include "platform.cuh"

namespace stem {

struct Largest {
  static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

struct Sum {
  static __device__ float of(float a, float b) { return a + b; }
};

// Combines COUNT numbers of each lane over the eight lanes that differ in g = lane / 4. Each step
// hands the other lane the half that it will keep: less than COUNT shuffles, not 3 COUNT.
// Leaves the numbers first_of_mine<COUNT>(lane) ... + COUNT / 8 - 1 of the original in the front.
template <typename Combine, int COUNT, int BIT = 16, int TOTAL>
__device__ inline void combine_over_rows(float (&x)[TOTAL], int lane) {
  constexpr int HALF = COUNT / 2;
  const bool upper = lane & BIT;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + HALF], BIT);
    x[i] = Combine::of(upper ? x[i + HALF] : x[i], other);
  }
  if constexpr (BIT > 4) combine_over_rows<Combine, HALF, BIT / 2>(x, lane);
}

template <int COUNT>
__device__ inline int first_of_mine(int lane) {
  return lane / 16 % 2 * (COUNT / 2) + lane / 8 % 2 * (COUNT / 4) + lane / 4 % 2 * (COUNT / 8);
}

// Shared memory for a softmax over TOKENS columns, with room for the largest block, so that all
// addresses are a thread's own plus constants.
template <int TOKENS>
struct SoftmaxScratch {
  static constexpr int WARPS = LARGEST_BLOCK / WARP, BYTES = 3 * WARPS * TOKENS * 4;
  float* b_largest;  // [WARPS, TOKENS]
  float* b_total;    // [WARPS, TOKENS]
  float* b_mine;     // [TOKENS], each warp's own

  __device__ SoftmaxScratch(void* b, int warp)
      : b_largest(static_cast<float*>(b)),
        b_total(b_largest + WARPS * TOKENS),
        b_mine(b_total + WARPS * TOKENS + warp * TOKENS) {}

  // Column 2 i + j of a fragment row is token 8 i + 2 t + j.
  static __device__ int token_of(int column, int lane) {
    return column / 2 * 8 + lane % 4 * 2 + column % 2;
  }
};

// What responsibilities are multiplied by before they are rounded to T. In float16 those below 2^-25
// would be 0 in the sums and count in the mass; times 2^15 only those below 2^-40 are. Sums and mass
// are both in this unit until em_update_kernel.
template <typename T>
constexpr float WEIGHT_UNIT = std::is_same_v<T, __half> ? 32768.0f : 1.0f;

// b_s: C fragments of a warp's [16 M_TILES bases, 8 N_TILES tokens]; logits become
// responsibilities in a unit. `bases` is how many of this and the following warps' bases there are, `tokens`
// how many of the columns; the rest get 0. All warps of the block take part.
template <int M_TILES, int N_TILES>
__device__ inline void softmax_over_bases(
    float (&b_s)[M_TILES][N_TILES][4], const SoftmaxScratch<8 * N_TILES>& scratch, float scale,
    int bases, int tokens, float unit) {
  constexpr int TOKENS = 8 * N_TILES, COLUMNS = 2 * N_TILES, MINE = COLUMNS / 8;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  if (bases < 16 * M_TILES) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < N_TILES; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (16 * m + lane / 4 + c / 2 * 8 >= bases) b_s[m][i][c] = -INF;
  }
  // [COLUMNS], of the tokens that this lane holds
  float b_column[COLUMNS];
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    b_column[i] = -INF;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
      b_column[i] =
          fmaxf(b_column[i], fmaxf(b_s[m][i / 2][i % 2], b_s[m][i / 2][i % 2 + 2]));
  }
  combine_over_rows<Largest, COLUMNS>(b_column, lane);
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    int token = scratch.token_of(first_of_mine<COLUMNS>(lane) + i, lane);
    scratch.b_largest[warp * TOKENS + token] = b_column[i];
  }
  __syncthreads();
  for (int token = lane; token < TOKENS; token += WARP) {
    float largest = -INF;
    for (int w = 0; w < warps; ++w)
      largest = fmaxf(largest, scratch.b_largest[w * TOKENS + token]);
    scratch.b_mine[token] = largest * scale;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    float shift = scratch.b_mine[scratch.token_of(i, lane)];
    b_column[i] = 0.0f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& s = b_s[m][i / 2][i % 2 + 2 * row];
        s = exp2_fast(fmaf(s, scale, -shift));
        b_column[i] += s;
      }
  }
  combine_over_rows<Sum, COLUMNS>(b_column, lane);
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    int token = scratch.token_of(first_of_mine<COLUMNS>(lane) + i, lane);
    scratch.b_total[warp * TOKENS + token] = b_column[i];
  }
  __syncthreads();
  for (int token = lane; token < TOKENS; token += WARP) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += scratch.b_total[w * TOKENS + token];
    scratch.b_mine[token] = token < tokens ? unit / total : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    float share = scratch.b_mine[scratch.token_of(i, lane)];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int row = 0; row < 2; ++row) b_s[m][i / 2][i % 2 + 2 * row] *= share;
  }
}

// The mass that the tokens of this lane add to the warp's bases: b_mass[m][row] is that of base
// 16 m + 8 row + g.
template <int M_TILES, int N_TILES>
__device__ inline void add_mass(
    float (&b_mass)[M_TILES][2], const float (&b_z)[M_TILES][N_TILES][4]) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float tile = 0.0f;  // one addition a tile is less rounding than one a token
#pragma unroll
      for (int i = 0; i < N_TILES; ++i) tile += b_z[m][i][2 * row] + b_z[m][i][2 * row + 1];
      b_mass[m][row] += tile;
    }
}

// Over the four lanes t of each row; the same in all of them.
__device__ inline float sum_over_columns(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float largest_over_columns(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace stem
