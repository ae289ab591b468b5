// For every query the key of the largest cosine: arg max_j q k_j / |k_j|.
//
// 16 bits: keys pass by a block's queries, a tile of both at a time; a warp owns 16 queries, and
// each lane keeps the best of the keys that it has seen; where queries are few, the keys come in
// ranges, whose best are compared afterwards. float32: products of a chunk of queries
// go through memory, and a warp looks through each row. Products are scaled afterwards, because
// keys rounded to 16 bits again would be other keys.
#pragma once

#include "copy.cuh"
#include "float32.cuh"
#include "mma.cuh"

namespace stem {

template <typename T>
struct NearestCall {
  View<T> query, keys;     // [B, h, n, d], [B, h, m, d]
  const float* p_inverse;  // [B, h, m]: one over the keys' lengths
  int32_t* p_found;        // [B, h, n]
  int64_t leads, n;
  int num_keys;
};

// The best key so far. Of equal products the first counts, and one that is NaN never does.
struct Best {
  float product = -INF;
  int key = 0;

  __device__ void offer(float other, int at) {
    if (other > product || (other == product && at < key)) product = other, key = at;
  }
  // With the best of the lane that differs in `bit`.
  __device__ void exchange(int bit) {
    const float other = __shfl_xor_sync(0xffffffffu, product, bit);
    const int at = __shfl_xor_sync(0xffffffffu, key, bit);
    offer(other, at);
  }
};

struct NearestShape {
  static constexpr int WARPS = LARGEST_BLOCK / WARP, ROWS = 16, QUERIES = WARPS * ROWS;
  static constexpr int KEYS = 128, DEPTH = 64, PITCH = pitch_of(DEPTH);
  static constexpr int SHARED = 2 * (QUERIES + KEYS) * PITCH * 2;
};

// The keys in ranges, of which each finds its best; p_product is null where there is one range.
template <typename T>
struct NearestArgs {
  NearestCall<T> call;
  float* p_product;  // [ranges, leads, n]
  int32_t* p_key;    // the same; with one range the result
  int range;         // keys, a multiple of KEYS
};

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK, 2) nearest_kernel(const NearestArgs<T> args) {
  using Shape = NearestShape;
  const NearestCall<T>& call = args.call;
  constexpr int N_TILES = Shape::KEYS / 8, PITCH = Shape::PITCH, DEPTH = Shape::DEPTH;
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int64_t tiles = ceil_div<int64_t>(call.n, Shape::QUERIES);
  const int64_t lead = blockIdx.x / tiles, start = blockIdx.x % tiles * Shape::QUERIES;
  STEM_SHARED(shared);
  T* b_query = reinterpret_cast<T*>(shared);          // [2, QUERIES, PITCH]
  T* b_keys = b_query + 2 * Shape::QUERIES * PITCH;   // [2, KEYS, PITCH]
  const T* p_query = call.query.at(lead) + start * call.query.stride_n;
  // From the range's first key on, and so are the numbers of keys until they are written.
  const int begin = blockIdx.y * args.range;
  const int num_keys = smaller(args.range, call.num_keys - begin);
  const T* p_keys = call.keys.at(lead) + begin * call.keys.stride_n;
  const float* p_inverse = call.p_inverse + lead * call.num_keys + begin;
  const int queries = static_cast<int>(smaller<int64_t>(Shape::QUERIES, call.n - start));
  const int depths = ceil_div(call.query.width, DEPTH);
  const int64_t steps = static_cast<int64_t>(ceil_div(num_keys, Shape::KEYS)) * depths;
  auto fetch = [&](int64_t step, int stage) {
    const int first = static_cast<int>(step / depths) * Shape::KEYS;
    const int channel = static_cast<int>(step % depths) * DEPTH;
    load_rows<Shape::QUERIES, DEPTH>(
        b_query + stage * Shape::QUERIES * PITCH, p_query + channel, call.query.stride_n, queries,
        call.query.width - channel, call.query.vectors, thread, LARGEST_BLOCK);
    load_rows<Shape::KEYS, DEPTH>(
        b_keys + stage * Shape::KEYS * PITCH, p_keys + first * call.keys.stride_n + channel,
        call.keys.stride_n, num_keys - first, call.keys.width - channel, call.keys.vectors,
        thread, LARGEST_BLOCK);
  };
  Best best[2];  // of rows lane / 4 and lane / 4 + 8
  // C fragments of [ROWS, KEYS]
  float b_s[N_TILES][4] = {};
  fetch(0, 0);
  copy_commit();
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step, stage ^= 1) {
    copy_wait<0>();
    __syncthreads();
    if (step + 1 < steps) fetch(step + 1, stage ^ 1);
    copy_commit();
    const T* b_q = b_query + (stage * Shape::QUERIES + warp * Shape::ROWS) * PITCH;
    const T* b_k = b_keys + stage * Shape::KEYS * PITCH;
#pragma unroll
    for (int depth = 0; depth < DEPTH; depth += 16) {
      uint32_t a[4];
      load_a<PITCH>(a, b_q + depth, lane);
#pragma unroll
      for (int i = 0; i < N_TILES; i += 2) {
        uint32_t b[4];
        load_b_by_column<PITCH>(b, b_k + 8 * i * PITCH + depth, lane);
        mma<T>(b_s[i], a, b[0], b[1]);
        mma<T>(b_s[i + 1], a, b[2], b[3]);
      }
    }
    if (step % depths < depths - 1) continue;
    const int first = static_cast<int>(step / depths) * Shape::KEYS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < N_TILES; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = first + 8 * i + c % 2;
        if (key < num_keys) best[c / 2].offer(b_s[i][c] * p_inverse[key], key);
        b_s[i][c] = 0.0f;
      }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    best[row].exchange(1);
    best[row].exchange(2);
    const int64_t n = start + warp * Shape::ROWS + 8 * row + lane / 4;
    if (lane % 4 != 0 || n >= call.n) continue;
    const int64_t place = (blockIdx.y * call.leads + lead) * call.n + n;
    args.p_key[place] = best[row].key + blockIdx.y * args.range;
    if (args.p_product != nullptr) args.p_product[place] = best[row].product;
  }
}

template <typename T>
struct NearestMergeArgs {  // T as nearest_kernel's: each dtype's source has its own
  const float* p_product;  // [ranges, rows]
  const int32_t* p_key;
  int32_t* p_found;  // [rows]
  int64_t rows;
  int ranges;
};

// A thread per row.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK)
    nearest_merge_kernel(const NearestMergeArgs<T> args) {
  const int64_t row = blockIdx.x * int64_t{LARGEST_BLOCK} + threadIdx.x;
  if (row >= args.rows) return;
  Best best;
  for (int64_t place = row; place < args.ranges * args.rows; place += args.rows)
    best.offer(args.p_product[place], args.p_key[place]);
  args.p_found[row] = best.key;
}

template <typename T>
struct RowsArgs {
  const T* p_z;            // [leads, stride_lead / keys, keys]
  const float* p_inverse;  // [leads, keys]
  int32_t* p_found;        // [leads, n]
  int64_t leads, rows, stride_lead, n;
  int keys;
};

// A warp per row.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK) nearest_rows_kernel(const RowsArgs<T> args) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = blockIdx.x * int64_t{LARGEST_BLOCK / WARP} + threadIdx.x / WARP;
  if (row >= args.leads * args.rows) return;
  const int64_t lead = row / args.rows;
  const T* p_z = args.p_z + lead * args.stride_lead + row % args.rows * args.keys;
  const float* p_inverse = args.p_inverse + lead * args.keys;
  Best best;
  for (int k = lane; k < args.keys; k += WARP) best.offer(p_z[k] * p_inverse[k], k);
  for (int bit = 1; bit < WARP; bit *= 2) best.exchange(bit);
  if (lane == 0) args.p_found[lead * args.n + row % args.rows] = best.key;
}

template <typename T>
void float32_nearest(const Context& context, const NearestCall<T>& call) {
  static_assert(std::is_same_v<T, float>);
  const int64_t keys = call.num_keys;
  const Chunk chunk = chunk_of(context.chunk_bytes, keys * 4, call.leads, call.n, ProductShape::M);
  float* p_z = context.make<float>(chunk.leads * chunk.tokens * keys);
  const int64_t stride_z = chunk.tokens * keys;
  const View<float> z = view<float>(p_z, stride_z, 0, keys, 1, call.num_keys);
  for (int64_t lead = 0; lead < call.leads; lead += chunk.leads)
    for (int64_t first = 0; first < call.n; first += chunk.tokens) {
      const int64_t leads = smaller(chunk.leads, call.leads - lead);
      const int64_t count = smaller(chunk.tokens, call.n - first);
      launch_product<false, false>(
          context,
          {call.query.from(lead, first), call.keys.from(lead, 0), z, p_z, nullptr, count,
           call.query.width, call.query.width, 0, 0, call.num_keys, false},
          leads, 1);
      const int64_t blocks = ceil_div<int64_t>(leads * count, LARGEST_BLOCK / WARP);
      launch("nearest_rows_kernel", nearest_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)),
             LARGEST_BLOCK, 0, context,
             RowsArgs<T>{p_z, call.p_inverse + lead * keys, call.p_found + lead * call.n + first,
                      leads, count, stride_z, call.n, call.num_keys});
    }
}

template <typename T>
void nearest_token(const Context& context, const NearestCall<T>& call) {
  if (call.leads == 0 || call.n == 0) return;
  if constexpr (std::is_same_v<T, float>) {
    float32_nearest(context, call);
  } else {
    const int64_t blocks = call.leads * ceil_div<int64_t>(call.n, NearestShape::QUERIES);
    const int64_t tiles = ceil_div(call.num_keys, NearestShape::KEYS);
    const int64_t wanted = smaller(tiles, larger<int64_t>(1, context.programs() / blocks));
    NearestArgs<T> args{call, nullptr, call.p_found, 0};
    args.range = static_cast<int>(ceil_div(tiles, wanted)) * NearestShape::KEYS;
    const int ranges = ceil_div(call.num_keys, args.range);
    const int64_t rows = call.leads * call.n;
    if (ranges > 1) {
      args.p_product = context.make<float>(ranges * rows);
      args.p_key = context.make<int32_t>(ranges * rows);
    }
    launch("nearest_kernel", nearest_kernel<T>,
           dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ranges)), LARGEST_BLOCK,
           NearestShape::SHARED, context, args);
    if (ranges == 1) return;
    launch("nearest_merge_kernel", nearest_merge_kernel<T>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, LARGEST_BLOCK))), LARGEST_BLOCK, 0,
           context, NearestMergeArgs<T>{args.p_product, args.p_key, call.p_found, rows, ranges});
  }
}

}  // namespace stem
