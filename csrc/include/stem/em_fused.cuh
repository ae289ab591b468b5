// One EM pass over narrow tokens of 16 bits, in one kernel: tokens are read once, responsibilities
// never leave the registers.
//
// A warp owns 32 bases: their directions (shared memory, as fragments), their logits for a tile of
// tokens and their sums (registers). Logits are made as [bases, tokens], so that after the softmax
// over the bases the responsibilities lie as the product with the tokens wants its left operand.
// The softmax is all that the warps of a block have to tell each other.
#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace stem {

template <typename T>
struct FusedArgs {
  View<T> tokens, values;  // [B, h, n, D], and [B, h, n, E]: what is summed
  const T* p_directions;   // [leads, padded bases / 16, STEPS] fragments
  float* p_sums;           // [splits, leads, K, E]
  float* p_mass;           // [splits, leads, K], or null
  int64_t n, tokens_per_split, stride_directions;
  int bases;
  float scale;
  bool separate;  // the values are not the tokens
};

// Fragments of 16 channels that cover a width, of those that kernels are made for; 0 if too wide.
inline int fused_steps(int width) {
  for (int steps : {3, 4, 5, 10})
    if (width <= 16 * steps) return steps;
  return 0;
}

// 64 tokens at a time, in eights; 32 with the widest, whose sums leave registers for no more logits,
// and with the narrowest, where half the registers then do and two blocks share a multiprocessor.
__host__ __device__ constexpr int fused_tiles(int steps) {
  return steps == 4 || steps == 5 ? 8 : 4;
}

inline int64_t fused_shared(int steps, int warps, bool separate) {
  int64_t tokens = 8 * fused_tiles(steps);
  int64_t tile = tokens * pitch_of(16 * steps) * 2;
  return 3 * LARGEST_BLOCK / WARP * tokens * 4 + warps * 2 * steps * WARP * 16 +
         (separate ? 4 : 2) * tile;
}

template <typename T, int STEPS>
__global__ void __launch_bounds__(LARGEST_BLOCK, STEPS < 4 ? 2 : 1)
    em_fused_kernel(const FusedArgs<T> args) {
  constexpr int M_TILES = 2, N_TILES = fused_tiles(STEPS), TOKENS = 8 * N_TILES;
  constexpr int WIDTH = 16 * STEPS, PITCH = pitch_of(WIDTH), TILE = TOKENS * PITCH;
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / WARP;
  const int warp = thread / WARP, lane = thread % WARP;
  const int64_t lead = blockIdx.x, split = blockIdx.y, leads = gridDim.x;
  STEM_SHARED(shared);
  SoftmaxScratch<TOKENS> scratch(shared, warp);
  // [2, TOKENS, PITCH]
  T* b_tokens = reinterpret_cast<T*>(shared + scratch.BYTES);
  // [warps, M_TILES, STEPS, WARP]
  uint4* b_directions = reinterpret_cast<uint4*>(b_tokens + 2 * TILE);
  // [2, TOKENS, PITCH]
  T* b_values = args.separate
                    ? reinterpret_cast<T*>(b_directions + warps * M_TILES * STEPS * WARP)
                    : b_tokens;

  const T* p_directions = args.p_directions + lead * args.stride_directions;
  for (int i = thread; i < warps * M_TILES * STEPS * WARP; i += threads)
    copy_async<16>(b_directions + i, p_directions + i * 8, 16);
  const int64_t begin = split * args.tokens_per_split;
  const int count = static_cast<int>(smaller(args.tokens_per_split, args.n - begin));
  const T* p_tokens = args.tokens.at(lead) + begin * args.tokens.stride_n;
  const T* p_values = args.values.at(lead) + begin * args.values.stride_n;
  auto fetch = [&](int start, int stage) {
    load_rows<TOKENS, WIDTH>(
        b_tokens + stage * TILE, p_tokens + start * args.tokens.stride_n, args.tokens.stride_n,
        count - start, args.tokens.width, args.tokens.vectors, thread, threads);
    if (args.separate) {
      load_rows<TOKENS, WIDTH>(
          b_values + stage * TILE, p_values + start * args.values.stride_n, args.values.stride_n,
          count - start, args.values.width, args.values.vectors, thread, threads);
    }
  };
  // C fragments of [16 M_TILES bases, WIDTH channels]
  float b_sums[M_TILES][2 * STEPS][4] = {};
  float b_mass[M_TILES][2] = {};
  fetch(0, 0);
  copy_commit();
  for (int start = 0; start < count; start += TOKENS) {
    const int stage = start / TOKENS % 2;  // kept from tile to tile it would be spilled on sm_120
    copy_wait<0>();
    __syncthreads();
    if (start + TOKENS < count) fetch(start + TOKENS, stage ^ 1);
    copy_commit();
    const T* b_x = b_tokens + stage * TILE;
    // C fragments of [16 M_TILES bases, TOKENS]
    float b_s[M_TILES][N_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        load_fragment(a[m], b_directions + ((warp * M_TILES + m) * STEPS + step) * WARP + lane);
#pragma unroll
      for (int i = 0; i < N_TILES; i += 2) {
        uint32_t b[4];
        load_b_by_column<PITCH>(b, b_x + 8 * i * PITCH + 16 * step, lane);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma<T>(b_s[m][i], a[m], b[0], b[1]);
          mma<T>(b_s[m][i + 1], a[m], b[2], b[3]);
        }
      }
    }
    softmax_over_bases(
        b_s, scratch, args.scale, args.bases - 32 * warp, count - start, WEIGHT_UNIT<T>);
    add_mass(b_mass, b_s);
    const T* b_v = b_values + stage * TILE;
#pragma unroll
    for (int i = 0; i < N_TILES; i += 2) {
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        a[m][0] = pack<T>(b_s[m][i][0], b_s[m][i][1]);
        a[m][1] = pack<T>(b_s[m][i][2], b_s[m][i][3]);
        a[m][2] = pack<T>(b_s[m][i + 1][0], b_s[m][i + 1][1]);
        a[m][3] = pack<T>(b_s[m][i + 1][2], b_s[m][i + 1][3]);
      }
#pragma unroll
      for (int j = 0; j < 2 * STEPS; j += 2) {
        uint32_t b[4];
        load_b_by_row<PITCH>(b, b_v + 8 * i * PITCH + 8 * j, lane);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma<T>(b_sums[m][j], a[m], b[0], b[1]);
          mma<T>(b_sums[m][j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  const int64_t row = (split * leads + lead) * args.bases;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int base = 32 * warp + 16 * m + 8 * half + lane / 4;
      const float mass = sum_over_columns(b_mass[m][half]);
      if (base >= args.bases) continue;
      if (args.p_mass != nullptr && lane % 4 == 0) args.p_mass[row + base] = mass;
      float* p_sums = args.p_sums + (row + base) * args.values.width;
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int channel = 8 * j + lane % 4 * 2 + c;
          if (channel < args.values.width) p_sums[channel] = b_sums[m][j][2 * half + c];
        }
    }
}

// Into `splits` parts; p_mass may be null.
template <typename T>
void launch_fused(
    const Context& context, const View<T>& tokens, const View<T>& values, bool separate,
    const T* p_directions, int64_t stride_directions, int steps, int64_t leads, int64_t n,
    int64_t tokens_per_split, int splits, int bases, float scale, float* p_sums, float* p_mass) {
  const FusedArgs<T> args{tokens, values, p_directions,     p_sums, p_mass, n, tokens_per_split,
                          stride_directions, bases, scale, separate};
  const int warps = ceil_div(bases, 32);
  const dim3 grid(static_cast<unsigned>(leads), static_cast<unsigned>(splits));
  auto run = [&](auto kernel) {
    launch("em_fused_kernel", kernel, grid, warps * WARP, fused_shared(steps, warps, separate),
           context, args);
  };
  if (steps == 3) run(em_fused_kernel<T, 3>);
  if (steps == 4) run(em_fused_kernel<T, 4>);
  if (steps == 5) run(em_fused_kernel<T, 5>);
  if (steps == 10) run(em_fused_kernel<T, 10>);
}

}  // namespace stem
