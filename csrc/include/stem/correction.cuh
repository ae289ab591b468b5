// What calibrated bases add to an attention's output: (query - mean) matrix + a constant, in
// float32 by plain multiplications. A block has 32 queries of a head; a thread four of them, and
// every 32nd channel of the output.
#pragma once

#include "copy.cuh"

namespace stem {

template <typename T>
struct CorrectionCall {
  View<T> query;       // [B, h, n, d]
  View<float> matrix;  // [B, h, d + 1, e]; the last row is the constant
  View<float> mean;    // [B, h, 1, d]
  T* p_out;            // [B, n, h, e], added to
  int64_t leads, n;
};

struct CorrectionShape {
  static constexpr int QUERIES = 32, OWN = QUERIES * WARP / LARGEST_BLOCK;
  static int64_t shared(int width) { return QUERIES * width * 4; }
};

template <typename T>
__global__ void __launch_bounds__(LARGEST_BLOCK) correction_kernel(const CorrectionCall<T> call) {
  using Shape = CorrectionShape;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t tiles = ceil_div<int64_t>(call.n, Shape::QUERIES);
  const int64_t lead = blockIdx.x / tiles, start = blockIdx.x % tiles * Shape::QUERIES;
  const int width = call.query.width, value_width = call.matrix.width, heads = call.query.heads;
  STEM_SHARED(shared);
  // [OWN, width] of this warp
  float* b_query = reinterpret_cast<float*>(shared) + warp * Shape::OWN * width;
  const int64_t first = start + warp * Shape::OWN;
  const T* p_query = call.query.at(lead) + first * call.query.stride_n;
  const float* p_mean = call.mean.at(lead);
  for (int i = 0; i < Shape::OWN; ++i)
    for (int channel = lane; channel < width; channel += WARP)
      b_query[i * width + channel] =
          first + i < call.n
              ? widen(p_query[i * call.query.stride_n + channel]) - p_mean[channel]
              : 0.0f;
  __syncwarp();
  const float* p_matrix = call.matrix.at(lead);
  T* p_out = call.p_out + (lead / heads * call.n * heads + lead % heads) * value_width;
  for (int column = lane; column < value_width; column += WARP) {
    float sums[Shape::OWN] = {};
    for (int channel = 0; channel < width; ++channel) {
      const float factor = p_matrix[channel * call.matrix.stride_n + column];
#pragma unroll
      for (int i = 0; i < Shape::OWN; ++i)
        sums[i] = fmaf(b_query[i * width + channel], factor, sums[i]);
    }
    const float constant = p_matrix[width * call.matrix.stride_n + column];
#pragma unroll
    for (int i = 0; i < Shape::OWN; ++i) {
      if (first + i >= call.n) continue;
      T* p = p_out + (first + i) * heads * value_width + column;
      *p = narrow<T>(widen(*p) + (sums[i] + constant));
    }
  }
}

template <typename T>
void add_correction(const Context& context, const CorrectionCall<T>& call) {
  if (call.leads == 0 || call.n == 0) return;
  const int64_t tiles = ceil_div<int64_t>(call.n, CorrectionShape::QUERIES);
  launch("correction_kernel", correction_kernel<T>,
         dim3(static_cast<unsigned>(call.leads * tiles)), LARGEST_BLOCK,
         CorrectionShape::shared(call.query.width), context, call);
}

}  // namespace stem
