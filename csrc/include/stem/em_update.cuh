// The ends of an EM iteration: parts of sums to bases, and bases to directions, which are kept as
// the passes want them: as matrix fragments in 16 bits, or as plain rows in float32.
#pragma once

#include "mma.cuh"
#include "softmax.cuh"

namespace stem {

template <typename T>
struct Directions {
  T* p;
  int64_t stride;            // from lead to lead
  int rows, columns, steps;  // padded; fragments of 16 columns

  __device__ T* at(int64_t lead, int row, int column) const {
    if constexpr (std::is_same_v<T, float>) {
      return p + lead * stride + static_cast<int64_t>(row) * columns + column;
    } else {
      return p + lead * stride + fragment_offset(row, column, steps);
    }
  }
};

// In a fixed order, the same in all threads. b [warps] must not be in use.
__device__ inline float sum_over_block(float x, float* b) {
  for (int bit = 1; bit < WARP; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
  if (threadIdx.x % WARP == 0) b[threadIdx.x / WARP] = x;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / WARP; ++w) total += b[w];
  return total;
}

template <typename T>
struct DirectionsArgs {
  const float* p_bases;  // [leads, bases, width]
  Directions<T> directions;
  int bases, width;
  bool normalize;
};

// A block per row, padding included: what the products multiply must not be NaN.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK) em_directions_kernel(
    const DirectionsArgs<T> args) {
  STEM_SHARED(shared);
  const int64_t lead = blockIdx.x / args.directions.rows;
  const int row = static_cast<int>(blockIdx.x % args.directions.rows);
  const float* p_base = args.p_bases + (lead * args.bases + row) * args.width;
  auto base = [&](int c) { return row < args.bases && c < args.width ? p_base[c] : 0.0f; };
  float square = 0.0f;
  for (int c = threadIdx.x; c < args.width; c += blockDim.x) square += base(c) * base(c);
  const float length = sqrtf(sum_over_block(square, reinterpret_cast<float*>(shared))) + NORM_EPS;
  for (int c = threadIdx.x; c < args.directions.columns; c += blockDim.x)
    *args.directions.at(lead, row, c) = narrow<T>(args.normalize ? base(c) / length : base(c));
}

template <typename T>
struct UpdateArgs {
  const float* p_parts;      // [parts, rows, width]; rows are leads x bases
  const float* p_mass_parts; // [mass_parts, rows]
  const float* p_old;        // [rows, width], what an empty base keeps; may be p_out; null: nothing
  float* p_out;              // [rows, width]
  float* p_mass;             // [rows], or null
  Directions<T> directions;  // of the next iteration, or null
  int64_t rows;
  int parts, mass_parts, width, bases;
  float least_mass;
  bool divide, normalize;
};

inline int64_t update_shared(int width) {
  return (2 + width) * static_cast<int64_t>(LARGEST_BLOCK / WARP) * 4;
}

// A block per row. A warp adds every eighth part, then the warps' sums are added in their order.
template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK) em_update_kernel(const UpdateArgs<T> args) {
  constexpr int WARPS = LARGEST_BLOCK / WARP;
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int64_t row = blockIdx.x;
  STEM_SHARED(shared);
  float* b_mass = reinterpret_cast<float*>(shared);  // [WARPS]
  float* b_square = b_mass + WARPS;                  // [WARPS]
  float* b_sums = b_square + WARPS;                  // [WARPS, width]
  for (int c = lane; c < args.width; c += WARP) {
    float sum = 0.0f;
#pragma unroll 4
    for (int s = warp; s < args.parts; s += WARPS)
      sum += args.p_parts[(s * args.rows + row) * args.width + c];
    b_sums[warp * args.width + c] = sum;
  }
  float mass = 0.0f;
  for (int s = thread; s < args.mass_parts; s += LARGEST_BLOCK)
    mass += args.p_mass_parts[s * args.rows + row];
  mass = sum_over_block(mass, b_mass) / WEIGHT_UNIT<T>;
  const bool is_empty = args.p_old != nullptr && mass < args.least_mass;
  float square = 0.0f;
  for (int c = thread; c < args.width; c += LARGEST_BLOCK) {
    float value = 0.0f;
    for (int w = 0; w < WARPS; ++w) value += b_sums[w * args.width + c];
    value /= WEIGHT_UNIT<T>;
    if (args.divide) value /= mass + MASS_EPS;
    if (is_empty) value = args.p_old[row * args.width + c];
    args.p_out[row * args.width + c] = value;
    b_sums[c] = value;  // no other thread reads this column
    square += value * value;
  }
  if (args.p_mass != nullptr && thread == 0) args.p_mass[row] = is_empty ? 0.0f : mass;
  if (args.directions.p == nullptr) return;
  const float length = sqrtf(sum_over_block(square, b_square)) + NORM_EPS;
  const int64_t lead = row / args.bases;
  const int base = static_cast<int>(row % args.bases);
  for (int c = thread; c < args.width; c += LARGEST_BLOCK)
    *args.directions.at(lead, base, c) = narrow<T>(args.normalize ? b_sums[c] / length : b_sums[c]);
}

}  // namespace stem
