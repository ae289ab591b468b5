// Exact attention of a few queries to many keys: a block has one part of a head's keys and 32 of
// its queries; what it finds of each part is merged afterwards, in the parts' order.
//
// Plain float32 multiplications whatever the dtype: a thread has a query and every eighth key of a
// tile, then that query and every eighth channel of the values.
#pragma once

#include "copy.cuh"

namespace stem {

constexpr int PARTIAL_WIDTH = 160;  // the largest d and e

template <typename T>
struct PartialCall {
  View<T> query, key, value;  // [B, h, m, d], [B, h, n, d], [B, h, n, e]
  float* p_out;               // [B, h, m, e]
  float* p_logsumexp;         // [B, h, m]
  int64_t leads, n;
  int queries;
  float scale;
};

// What each part of the keys gives: sums of weighted values, of weights, the largest logit.
struct PartialStates {
  float* p_sums;     // [parts, leads, m, e]
  float* p_mass;     // [parts, leads, m]
  float* p_largest;  // [parts, leads, m], in base 2
  int64_t parts;
};

template <typename T>
struct PartialArgs {
  PartialCall<T> call;
  PartialStates states;
};

struct PartialShape {
  static constexpr int QUERIES = 32, KEYS = 32, SIDE = LARGEST_BLOCK / QUERIES;
  static int64_t shared(int width, int value_width) {
    return ((QUERIES + KEYS) * (width + 1) + KEYS * (value_width + 1) + QUERIES * (KEYS + 1)) * 4;
  }
  // By the shapes and the GPU alone, so that equal calls give equal bits. A sum takes a tile of
  // keys at a time.
  static int64_t parts(const Context& context, int64_t leads, int64_t queries, int64_t n) {
    const int64_t blocks = leads * ceil_div<int64_t>(queries, QUERIES);
    const int64_t least = smaller<int64_t>(ceil_div(n, context.longest_sum * KEYS), LARGEST_GRID);
    const int64_t wanted = larger(least, ceil_div(4 * context.programs(), blocks));
    return smaller(ceil_div<int64_t>(n, 8 * KEYS), wanted);
  }
};

// `rows` rows of p as float32 into [ROWS, width + 1]; the other rows are zero.
template <int ROWS, typename T>
__device__ inline void widen_rows(
    float* b_tile, const T* p, int64_t stride, int64_t rows, int width) {
  for (int row = threadIdx.x / WARP; row < ROWS; row += LARGEST_BLOCK / WARP)
    for (int column = threadIdx.x % WARP; column < width; column += WARP)
      b_tile[row * (width + 1) + column] = row < rows ? widen(p[row * stride + column]) : 0.0f;
}

// COUNT * SIDE channels of values at most.
template <typename T, int COUNT>
__global__ void __launch_bounds__(LARGEST_BLOCK, 2) partial_kernel(const PartialArgs<T> args) {
  using Shape = PartialShape;
  constexpr int KEYS = Shape::KEYS, SIDE = Shape::SIDE, OWN = KEYS / SIDE, FEW = 4;
  const PartialCall<T>& call = args.call;
  const int row = threadIdx.x / SIDE, side = threadIdx.x % SIDE;
  const int width = call.query.width, value_width = call.value.width;
  const int tiles = ceil_div(call.queries, Shape::QUERIES);
  const int64_t lead = blockIdx.x / tiles, part = blockIdx.y;
  const int start = static_cast<int>(blockIdx.x % tiles) * Shape::QUERIES;
  const int64_t begin = call.n * part / args.states.parts;
  const int64_t end = call.n * (part + 1) / args.states.parts;
  STEM_SHARED(shared);
  float* b_query = reinterpret_cast<float*>(shared);            // [QUERIES, width + 1]
  float* b_key = b_query + Shape::QUERIES * (width + 1);        // [KEYS, width + 1]
  float* b_value = b_key + KEYS * (width + 1);                  // [KEYS, value_width + 1]
  float* b_weight = b_value + KEYS * (value_width + 1) + row * (KEYS + 1);  // [QUERIES, KEYS + 1]
  widen_rows<Shape::QUERIES>(
      b_query, call.query.at(lead) + start * call.query.stride_n, call.query.stride_n,
      call.queries - start, width);
  const float scale = call.scale * LOG2E;
  float largest = -INF, mass = 0.0f, sums[COUNT] = {};
  for (int64_t first = begin; first < end; first += KEYS) {
    __syncthreads();
    widen_rows<KEYS>(b_key, call.key.at(lead) + first * call.key.stride_n, call.key.stride_n,
                     end - first, width);
    widen_rows<KEYS>(b_value, call.value.at(lead) + first * call.value.stride_n,
                     call.value.stride_n, end - first, value_width);
    __syncthreads();
    float logits[OWN] = {};
    for (int channel = 0; channel < width; ++channel) {
      const float factor = b_query[row * (width + 1) + channel];
#pragma unroll
      for (int j = 0; j < OWN; ++j)
        logits[j] = fmaf(factor, b_key[(side + SIDE * j) * (width + 1) + channel], logits[j]);
    }
    float highest = largest;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      logits[j] = first + side + SIDE * j < end ? logits[j] * scale : -INF;
      highest = fmaxf(highest, logits[j]);
    }
    for (int bit = 1; bit < SIDE; bit *= 2)
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, bit));
    // -inf - -inf is NaN.
    const float shift = highest == -INF ? 0.0f : highest;
    const float rescale = exp2_fast(largest - shift);
    largest = highest;
    float tile_mass = 0.0f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const float weight = exp2_fast(logits[j] - shift);
      tile_mass += weight;
      b_weight[side + SIDE * j] = weight;
    }
    mass = fmaf(mass, rescale, tile_mass);
    __syncwarp();
    // A few channels at a time: the sums of all beside the others would take too many registers.
#pragma unroll
    for (int first_of_few = 0; first_of_few < COUNT; first_of_few += FEW) {
      float tile[FEW] = {};
      for (int key = 0; key < KEYS; ++key) {
        const float weight = b_weight[key];
        const float* b_row = b_value + key * (value_width + 1);
#pragma unroll
        for (int i = 0; i < FEW; ++i) {
          const int channel = side + SIDE * (first_of_few + i);
          if (channel < value_width) tile[i] = fmaf(weight, b_row[channel], tile[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < FEW; ++i)
        sums[first_of_few + i] = fmaf(sums[first_of_few + i], rescale, tile[i]);
    }
  }
  for (int bit = 1; bit < SIDE; bit *= 2) mass += __shfl_xor_sync(0xffffffffu, mass, bit);
  if (start + row >= call.queries) return;
  const int64_t place = (part * call.leads + lead) * call.queries + start + row;
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (side + SIDE * i < value_width)
      args.states.p_sums[place * value_width + side + SIDE * i] = sums[i];
  if (side == 0) args.states.p_mass[place] = mass, args.states.p_largest[place] = largest;
}

template <typename T>
struct MergeArgs {  // T as partial_kernel's: each dtype's source has its own
  PartialStates states;
  float* p_out;
  float* p_logsumexp;
  int64_t rows;  // leads * m
  int width;
};

// Parts are added to runs of so many, and the runs to one another.
constexpr int MERGED_RUN = 64;

// A warp per row.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK) merge_kernel(const MergeArgs<T> args) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = blockIdx.x * int64_t{LARGEST_BLOCK / WARP} + threadIdx.x / WARP;
  if (row >= args.rows) return;
  const PartialStates& states = args.states;
  float largest = -INF;
  for (int64_t part = 0; part < states.parts; ++part)
    largest = fmaxf(largest, states.p_largest[part * args.rows + row]);
  const float shift = largest == -INF ? 0.0f : largest;
  // The sum over parts of what is found at a part's place, times its share.
  auto merged = [&](auto found) {
    float sum = 0.0f;
    for (int64_t first = 0; first < states.parts; first += MERGED_RUN) {
      float run = 0.0f;
      for (int64_t part = first; part < smaller(states.parts, first + MERGED_RUN); ++part) {
        const int64_t place = part * args.rows + row;
        run += found(place) * exp2_fast(states.p_largest[place] - shift);
      }
      sum += run;
    }
    return sum;
  };
  const float mass = merged([&](int64_t place) { return states.p_mass[place]; });
  for (int channel = lane; channel < args.width; channel += WARP)
    args.p_out[row * args.width + channel] =
        merged([&](int64_t place) { return states.p_sums[place * args.width + channel]; }) / mass;
  constexpr float LN2 = 0.69314718055994531f;
  if (lane == 0) args.p_logsumexp[row] = fmaf(largest, LN2, logf(mass));
}

template <typename T>
void partial_attention(const Context& context, const PartialCall<T>& call) {
  using Shape = PartialShape;
  const int64_t rows = call.leads * call.queries;
  if (rows == 0) return;
  const int width = call.value.width;
  const int64_t parts = Shape::parts(context, call.leads, call.queries, call.n);
  const PartialStates states{
      context.make<float>(parts * rows * width), context.make<float>(parts * rows),
      context.make<float>(parts * rows), parts};
  const int64_t blocks = call.leads * ceil_div(call.queries, Shape::QUERIES);
  launch("partial_kernel",
         width <= 8 * Shape::SIDE ? partial_kernel<T, 8> : partial_kernel<T, 20>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), LARGEST_BLOCK,
         Shape::shared(call.query.width, width), context, PartialArgs<T>{call, states});
  launch("merge_kernel", merge_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, LARGEST_BLOCK / WARP))), LARGEST_BLOCK,
         0, context, MergeArgs<T>{states, call.p_out, call.p_logsumexp, rows, width});
}

}  // namespace stem
