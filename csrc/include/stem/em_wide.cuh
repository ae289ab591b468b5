// One EM pass over wide tokens of 16 bits, or to many bases: two matrix products.
//
// The sums [K, D] of one block's tokens do not fit on the chip. A first kernel writes the
// responsibilities of a chunk of tokens, in 16 bit, to memory small enough to stay in the L2 cache
// mostly; a second one multiplies them with the tokens.
#pragma once

#include "copy.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace stem {

constexpr int WIDE_TILE = 128;  // tokens; a chunk is made of whole tiles

template <typename T>
struct ResponsibilitiesArgs {
  View<T> tokens;         // [B, h, n, D], from the chunk's first token on
  const T* p_directions;  // [leads, padded bases / 16, steps] fragments
  T* p_z;                 // [leads, K, chunk]
  float* p_mass;          // [parts, all leads, K]
  int64_t chunk, stride_directions, stride_part;
  int count, bases, steps;
  float scale;
  bool add;  // to the mass of the chunks before
};

// Two shapes of it: 32 bases a warp and 128 tokens, or 128 bases a warp and 32 tokens.
template <int M_TILES>
struct WideShape {
  static constexpr int N_TILES = 32 / M_TILES, TOKENS = 8 * N_TILES;
  static constexpr int SLICE = M_TILES > 2 ? 1 : 2;  // fragments of 16 channels that are staged
  static constexpr int TILE = TOKENS * pitch_of(16 * SLICE);
  static int64_t shared(int warps) {
    return SoftmaxScratch<TOKENS>::BYTES + 2 * (TILE * 2 + warps * M_TILES * SLICE * WARP * 16);
  }
};

template <typename T, int M_TILES>
__global__ void __launch_bounds__(LARGEST_BLOCK)
    em_responsibilities_kernel(const ResponsibilitiesArgs<T> args) {
  using Shape = WideShape<M_TILES>;
  constexpr int N_TILES = Shape::N_TILES, TOKENS = Shape::TOKENS, SLICE = Shape::SLICE;
  constexpr int WIDTH = 16 * SLICE, PITCH = pitch_of(WIDTH), FRAGMENTS = M_TILES * SLICE * WARP;
  const int thread = threadIdx.x, threads = blockDim.x, warps = threads / WARP;
  const int warp = thread / WARP, lane = thread % WARP;
  const int64_t lead = blockIdx.x;
  STEM_SHARED(shared);
  SoftmaxScratch<TOKENS> scratch(shared, warp);
  // [2, TOKENS, PITCH]
  T* b_tokens = reinterpret_cast<T*>(shared + scratch.BYTES);
  // [2, warps, M_TILES, SLICE, WARP]
  uint4* b_directions = reinterpret_cast<uint4*>(b_tokens + 2 * Shape::TILE);

  const int64_t stride = args.tokens.stride_n;
  const T* p_tokens = args.tokens.at(lead);
  const T* p_directions = args.p_directions + (args.tokens.first + lead) * args.stride_directions;
  float b_mass[M_TILES][2] = {};
  for (int start = blockIdx.y * TOKENS; start < args.count; start += gridDim.y * TOKENS) {
    auto fetch = [&](int step, int stage) {
      // Each warp brings its own bases. Unrolled, the addresses would take too many registers.
#pragma unroll 1
      for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int s = 0; s < SLICE; ++s)
          copy_async<16>(
              b_directions + (stage * warps + warp) * FRAGMENTS + (m * SLICE + s) * WARP + lane,
              p_directions + (((warp * M_TILES + m) * args.steps + step + s) * WARP + lane) * 8,
              16);
      load_rows<TOKENS, WIDTH>(
          b_tokens + stage * Shape::TILE, p_tokens + start * stride + 16 * step, stride,
          args.count - start, args.tokens.width - 16 * step, args.tokens.vectors, thread, threads);
    };
    // C fragments of [16 M_TILES bases, TOKENS]
    float b_s[M_TILES][N_TILES][4] = {};
    fetch(0, 0);
    copy_commit();
    int stage = 0;
    for (int step = 0; step < args.steps; step += SLICE, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();
      if (step + SLICE < args.steps) fetch(step + SLICE, stage ^ 1);
      copy_commit();
      const uint4* b_a = b_directions + (stage * warps + warp) * FRAGMENTS;
      const T* b_x = b_tokens + stage * Shape::TILE;
#pragma unroll
      for (int s = 0; s < SLICE; ++s) {
        uint32_t a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
          load_fragment(a[m], b_a + (m * SLICE + s) * WARP + lane);
#pragma unroll
        for (int i = 0; i < N_TILES; i += 2) {
          uint32_t b[4];
          load_b_by_column<PITCH>(b, b_x + 8 * i * PITCH + 16 * s, lane);
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
            mma<T>(b_s[m][i], a[m], b[0], b[1]);
            mma<T>(b_s[m][i + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    const int first = 16 * M_TILES * warp;
    softmax_over_bases(
        b_s, scratch, args.scale, args.bases - first, args.count - start, WEIGHT_UNIT<T>);
    add_mass(b_mass, b_s);
    // From row to row, rather than each row's place: those would be kept in registers.
    T* p_z = args.p_z + (lead * args.bases + first + lane / 4) * args.chunk + start + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half, p_z += 8 * args.chunk) {
        if (first + 16 * m + 8 * half + lane / 4 >= args.bases) continue;
#pragma unroll
        for (int i = 0; i < N_TILES; ++i)
          *reinterpret_cast<uint32_t*>(p_z + 8 * i) =
              pack<T>(b_s[m][i][2 * half], b_s[m][i][2 * half + 1]);
      }
  }
  float* p_mass =
      args.p_mass + blockIdx.y * args.stride_part + (args.tokens.first + lead) * args.bases;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int base = 16 * (M_TILES * warp + m) + 8 * half + lane / 4;
      const float mass = sum_over_columns(b_mass[m][half]);
      if (base < args.bases && lane % 4 == 0)
        p_mass[base] = args.add ? p_mass[base] + mass : mass;
    }
}

template <typename T>
struct ProductsArgs {
  View<T> values;  // [B, h, n, E], from the chunk's first token on
  const T* p_z;    // [leads, K, chunk], whole tiles of it written
  float* p_sums;   // [splits, all leads, K, E]
  int64_t chunk, stride_part;
  int count, tokens_per_split, bases, base_tiles, value_tiles;
  bool add;
};

// Blocks that are to share a multiprocessor. On sm_100 and 103 nvcc is not told (0), and finds 128
// registers a thread, which let two; on others it would then spill some of them in the loop.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ / 100 == 10
constexpr int PRODUCTS_BLOCKS = 0;
#else
constexpr int PRODUCTS_BLOCKS = 1;
#endif

// A block makes the sums of 128 bases and 160 channels, a warp those of 32 and 80.
struct ProductsShape {
  static constexpr int BASES = 128, CHANNELS = 160, TOKENS = 32, STAGES = 3;
  static constexpr int M_TILES = 2, N_TILES = 10;
  static constexpr int Z_PITCH = pitch_of(TOKENS), V_PITCH = pitch_of(CHANNELS);
  static constexpr int Z_TILE = BASES * Z_PITCH, V_TILE = TOKENS * V_PITCH;
  static constexpr int SHARED = STAGES * (Z_TILE + V_TILE) * 2;
};

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, PRODUCTS_BLOCKS) em_products_kernel(
    const ProductsArgs<T> args) {
  using Shape = ProductsShape;
  constexpr int M_TILES = Shape::M_TILES, N_TILES = Shape::N_TILES, STAGES = Shape::STAGES;
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int tiles = args.base_tiles * args.value_tiles;
  const int64_t lead = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles;
  const int o_base = tile / args.value_tiles * Shape::BASES;
  const int o_value = tile % args.value_tiles * Shape::CHANNELS;
  STEM_SHARED(shared);
  // [STAGES, BASES, Z_PITCH], [STAGES, TOKENS, V_PITCH]
  T* b_z = reinterpret_cast<T*>(shared);
  T* b_values = b_z + STAGES * Shape::Z_TILE;

  const T* p_z = args.p_z + (lead * args.bases + o_base) * args.chunk;
  const T* p_values = args.values.at(lead) + o_value;
  const int begin = blockIdx.y * args.tokens_per_split;
  const int end = smaller(args.count, begin + args.tokens_per_split);
  auto fetch = [&](int start, int stage) {
    if (start < end) {
      load_rows<Shape::BASES, Shape::TOKENS>(
          b_z + stage * Shape::Z_TILE, p_z + start, args.chunk, args.bases - o_base, Shape::TOKENS,
          true, thread, LARGEST_BLOCK);
      load_rows<Shape::TOKENS, Shape::CHANNELS>(
          b_values + stage * Shape::V_TILE, p_values + start * args.values.stride_n,
          args.values.stride_n, end - start, args.values.width - o_value, args.values.vectors,
          thread, LARGEST_BLOCK);
    }
    copy_commit();
  };
  const int warp_base = warp / 2 * 32, warp_value = warp % 2 * 80;
  // C fragments of [32 bases, 80 channels]
  float b_sums[M_TILES][N_TILES][4] = {};
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(begin + stage * Shape::TOKENS, stage);
  int stage = 0;
  for (int start = begin; start < end; start += Shape::TOKENS) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    fetch(start + (STAGES - 1) * Shape::TOKENS, stage == 0 ? STAGES - 1 : stage - 1);
    const T* b_a = b_z + stage * Shape::Z_TILE + warp_base * Shape::Z_PITCH;
    const T* b_v = b_values + stage * Shape::V_TILE + warp_value;
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    if (o_value + warp_value >= args.values.width) continue;
#pragma unroll
    for (int k = 0; k < Shape::TOKENS; k += 16) {
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        load_a<Shape::Z_PITCH>(a[m], b_a + 16 * m * Shape::Z_PITCH + k, lane);
#pragma unroll
      for (int j = 0; j < N_TILES; j += 2) {
        uint32_t b[4];
        load_b_by_row<Shape::V_PITCH>(b, b_v + k * Shape::V_PITCH + 8 * j, lane);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma<T>(b_sums[m][j], a[m], b[0], b[1]);
          mma<T>(b_sums[m][j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
  const int width = args.values.width;
  const int first = o_base + warp_base + lane / 4, o_channel = o_value + warp_value + lane % 4 * 2;
  float* p_sums = args.p_sums + blockIdx.y * args.stride_part +
                  ((args.values.first + lead) * args.bases + first) * width + o_channel;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half, p_sums += 8 * width) {
      if (first + 16 * m + 8 * half >= args.bases) continue;
#pragma unroll
      for (int j = 0; j < N_TILES; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (o_channel + 8 * j + c >= width) continue;
          const float sum = b_sums[m][j][2 * half + c];
          p_sums[8 * j + c] = args.add ? p_sums[8 * j + c] + sum : sum;
        }
    }
}

}  // namespace stem
