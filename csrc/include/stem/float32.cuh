// What float32 tensors take: products by plain float32 multiplications (no TF32: results agree with
// float64 to 1e-5), and a softmax along rows, over a chunk of logits in memory.
#pragma once

#include "copy.cuh"

namespace stem {

// How many leads, and how many of their tokens, are worked on at once; tokens in whole tiles.
struct Chunk {
  int64_t leads, tokens;
};

inline Chunk chunk_of(
    int64_t bytes, int64_t bytes_per_token, int64_t leads, int64_t n, int64_t tile) {
  const int64_t per_tile = bytes_per_token * tile;
  Chunk chunk{smaller(leads, larger<int64_t>(1, bytes / per_tile)), round_up(n, tile)};
  const int64_t tiles = larger<int64_t>(1, bytes / (per_tile * larger<int64_t>(1, chunk.leads)));
  chunk.tokens = smaller(chunk.tokens, tiles * tile);
  return chunk;
}

struct ProductArgs {
  View<float> a;       // memory [m, k], or [k, m] if A_BY_K
  View<float> b;       // memory [n, k], or [k, n] if B_BY_K
  View<float> layout;  // of the result [m, n]; its p is not used
  float* p_out;        // [splits], then as `layout` says
  float* p_mass;       // [splits, leads, m]: sums of a over k; or null
  int64_t size_m, size_k, k_per_split, stride_split, stride_mass_split;
  int size_n;
  bool add;
};

struct ProductShape {
  static constexpr int M = 128, N = 64, K = 16;
  static constexpr int A_TILE = M * (K + 1), B_TILE = N * (K + 1);
  static constexpr int SHARED = 2 * (A_TILE + B_TILE) * 4;
};

// Rows of a tile are [K + 1] long, or, by k, [SIZE]: threads then read neighbouring banks.
template <bool BY_K, int SIZE>
__device__ inline void fetch_float32(
    float* b_tile, const float* p, int64_t stride, int64_t size, int64_t k, int64_t k_end) {
  constexpr int K = ProductShape::K;
  for (int i = threadIdx.x; i < SIZE * K; i += LARGEST_BLOCK) {
    const int inner = BY_K ? i % SIZE : i / K;
    const int depth = BY_K ? i / SIZE : i % K;
    const bool valid = inner < size && k + depth < k_end;
    const int64_t offset = BY_K ? (k + depth) * stride + inner : inner * stride + k + depth;
    copy_async<4>(
        b_tile + (BY_K ? i : inner * (K + 1) + depth), p + (valid ? offset : 0), valid ? 4 : 0);
  }
}

// out[m, n] = sum_k a[m, k] b[n, k] in float32. A thread makes 8 x 4 of a block's 128 x 64.
template <bool A_BY_K, bool B_BY_K>
__global__ void __launch_bounds__(LARGEST_BLOCK) float32_product_kernel(const ProductArgs args) {
  using Shape = ProductShape;
  constexpr int ROWS = 8, COLUMNS = 4;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int n_tiles = ceil_div(args.size_n, Shape::N);
  const int64_t m_tiles = ceil_div<int64_t>(args.size_m, Shape::M);
  const int64_t o_n = blockIdx.x % n_tiles * Shape::N;
  const int64_t o_m = blockIdx.x / n_tiles % m_tiles * Shape::M;
  const int64_t lead = blockIdx.x / n_tiles / m_tiles, split = blockIdx.y;
  STEM_SHARED(shared);
  float* b_a = reinterpret_cast<float*>(shared);  // [2, A_TILE]
  float* b_b = b_a + 2 * Shape::A_TILE;           // [2, B_TILE]

  const float* p_a = args.a.at(lead) + o_m * (A_BY_K ? 1 : args.a.stride_n);
  const float* p_b = args.b.at(lead) + o_n * (B_BY_K ? 1 : args.b.stride_n);
  const int64_t begin = split * args.k_per_split;
  const int64_t end = smaller(args.size_k, begin + args.k_per_split);
  auto fetch = [&](int64_t k, int stage) {
    fetch_float32<A_BY_K, Shape::M>(
        b_a + stage * Shape::A_TILE, p_a, args.a.stride_n, args.size_m - o_m, k, end);
    fetch_float32<B_BY_K, Shape::N>(
        b_b + stage * Shape::B_TILE, p_b, args.b.stride_n, args.size_n - o_n, k, end);
  };
  const bool with_mass = args.p_mass != nullptr && o_n == 0 && x == 0;
  float sums[ROWS][COLUMNS] = {};
  float mass[ROWS] = {};
  if (begin < end) fetch(begin, 0);
  copy_commit();
  int stage = 0;
  for (int64_t k = begin; k < end; k += Shape::K, stage ^= 1) {
    copy_wait<0>();
    __syncthreads();
    if (k + Shape::K < end) fetch(k + Shape::K, stage ^ 1);
    copy_commit();
#pragma unroll
    for (int depth = 0; depth < Shape::K; ++depth) {
      float a[ROWS], b[COLUMNS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int m = y + 16 * i;
        a[i] = b_a[stage * Shape::A_TILE +
                   (A_BY_K ? depth * Shape::M + m : m * (Shape::K + 1) + depth)];
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const int n = x + 16 * j;
        b[j] = b_b[stage * Shape::B_TILE +
                   (B_BY_K ? depth * Shape::N + n : n * (Shape::K + 1) + depth)];
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      if (with_mass) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) mass[i] += a[i];
      }
    }
  }
  float* p_out = args.p_out + split * args.stride_split + args.layout.offset(lead);
  float* p_mass = args.p_mass + split * args.stride_mass_split +
                  (args.layout.first + lead) * args.size_m;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int64_t m = o_m + y + 16 * i;
    if (m >= args.size_m) continue;
    if (with_mass) p_mass[m] = args.add ? p_mass[m] + mass[i] : mass[i];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int64_t n = o_n + x + 16 * j;
      if (n >= args.size_n) continue;
      float* p = p_out + m * args.layout.stride_n + n;
      *p = args.add ? *p + sums[i][j] : sums[i][j];
    }
  }
}

template <bool A_BY_K, bool B_BY_K>
void launch_product(
    const Context& context, const ProductArgs& args, int64_t leads, int64_t splits) {
  using Shape = ProductShape;
  const int64_t tiles = ceil_div<int64_t>(args.size_m, Shape::M) * ceil_div(args.size_n, Shape::N);
  launch("float32_product_kernel", float32_product_kernel<A_BY_K, B_BY_K>,
         dim3(static_cast<unsigned>(leads * tiles), static_cast<unsigned>(splits)), LARGEST_BLOCK,
         Shape::SHARED, context, args);
}

template <typename T>
struct SoftmaxArgs {
  T* p_z;        // [leads, stride_lead / bases, bases]: logits become weights
  View<T> bias;  // [B, h, K, 1], or null
  int64_t leads, rows, stride_lead;
  int bases;
  float scale;  // of the logits, in base 2
  Shares shares;
};

// A warp per row.
template <typename T, bool WITH_BIAS>
__global__ void __launch_bounds__(LARGEST_BLOCK) float32_softmax_kernel(const SoftmaxArgs<T> args) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = blockIdx.x * int64_t{LARGEST_BLOCK / WARP} + threadIdx.x / WARP;
  if (row >= args.leads * args.rows) return;
  const int64_t lead = row / args.rows;
  T* p_z = args.p_z + lead * args.stride_lead + row % args.rows * args.bases;
  const T* p_bias = WITH_BIAS ? args.bias.at(lead) : nullptr;
  float largest = -INF;
  for (int k = lane; k < args.bases; k += WARP) {
    float s = p_z[k] * args.scale;
    if (WITH_BIAS) s += in_base_2(p_bias[k * args.bias.stride_n]);
    p_z[k] = s;
    largest = fmaxf(largest, s);
  }
  for (int bit = 1; bit < WARP; bit *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
  // Of a row whose bases are all excluded the sum is to be 0, and the weights 0 / 0.
  const float shift = largest == -INF ? 0.0f : largest;
  float total = 0.0f;
  for (int k = lane; k < args.bases; k += WARP) {
    const float weight = exp2_fast(p_z[k] - shift);
    p_z[k] = weight;
    total += weight;
  }
  for (int bit = 1; bit < WARP; bit *= 2) total += __shfl_xor_sync(0xffffffffu, total, bit);
  const float share = args.shares.of(lead, row % args.rows);
  // 0 times NaN would be NaN.
  for (int k = lane; k < args.bases; k += WARP) p_z[k] = share == 0.0f ? 0.0f : p_z[k] / total * share;
}

template <typename T>
void launch_softmax(const Context& context, const SoftmaxArgs<T>& args) {
  const int64_t blocks = ceil_div<int64_t>(args.leads * args.rows, LARGEST_BLOCK / WARP);
  auto* kernel =
      args.bias.p == nullptr ? float32_softmax_kernel<T, false> : float32_softmax_kernel<T, true>;
  launch("float32_softmax_kernel", kernel,
         dim3(static_cast<unsigned>(blocks)), LARGEST_BLOCK, 0, context, args);
}

}  // namespace stem
