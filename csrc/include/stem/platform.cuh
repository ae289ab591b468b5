// What the kernels need of what compiles and launches them: nvcc, or g++ with the tests' emulator
// (STEM_EMULATOR), which gives the same names the same meaning on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef STEM_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The dynamic shared memory of a block; cp.async and ldmatrix want 16-byte boundaries.
#define STEM_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace stem {

constexpr int WARP = 32;
constexpr int LARGEST_BLOCK = 256;  // threads
constexpr int LARGEST_GRID = 65535;  // blocks along any axis but the first
constexpr float LOG2E = 1.4426950408889634f;
constexpr float MASS_EPS = 1e-4f;  // added to a base's mass, and
constexpr float NORM_EPS = 1e-4f;  // to its length, before the division

// Where an operator runs, and where it gets memory from.
struct Context {
  cudaStream_t stream;
  int shared_limit;     // bytes of shared memory that a block may ask for
  int multiprocessors;
  std::function<void*(int64_t bytes)> allocate;  // lives until the operator returns
  // Of logits or responsibilities that go through memory: they should stay in the L2 cache mostly.
  int64_t chunk_bytes = 1 << 24;
  // Additions that one float32 sum is made of at most: each rounds, by more as the sum grows, and
  // tensor cores truncate. What there is more of goes into further parts.
  int64_t longest_sum = 1 << 10;

  // Blocks to aim at.
  int64_t programs() const { return 2 * int64_t{multiprocessors}; }

  template <typename T>
  T* make(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
};

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

template <typename T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a > b ? a : b;
}

// Launches with one argument, a struct. Throws with the kernel's name.
template <typename Args>
void launch(
    const char* name, void (*kernel)(Args), dim3 grid, int threads, int64_t shared,
    [[maybe_unused]] const Context& context, const Args& args) {
#ifdef STEM_EMULATOR
  emulator::run(name, grid, threads, shared, [&] { kernel(args); });
#else
  auto check = [&](cudaError_t status) {
    if (status != cudaSuccess) {
      throw std::runtime_error(
          std::string(name) + ": " + cudaGetErrorString(status) + " (grid " +
          std::to_string(grid.x) + " x " + std::to_string(grid.y) + ", " + std::to_string(threads) +
          " threads, " + std::to_string(shared) + " bytes of shared memory)");
    }
  };
  if (shared > 48 * 1024) {  // more must be asked for
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  kernel<<<grid, threads, static_cast<size_t>(shared), context.stream>>>(args);
  check(cudaGetLastError());
#endif
}

// Numbers of 16 bits.

template <typename T>
__device__ T narrow(float x);

template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two numbers as one register of a matrix fragment holds them, the first in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&both, &pair, sizeof(both));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&both, &pair, sizeof(both));
  }
  return both;
}

__device__ inline float exp2_fast(float x) {
#ifdef STEM_EMULATOR
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

constexpr float INF = std::numeric_limits<float>::infinity();

// A bias in base 2. Only -inf excludes a base: the lowest finite bias must not become it.
__device__ inline float in_base_2(float bias) {
  constexpr float LARGEST = 0x1p127f;
  const float scaled = bias * LOG2E;
  if (bias == INF || bias == -INF) return bias;
  return scaled > LARGEST ? LARGEST : scaled < -LARGEST ? -LARGEST : scaled;
}

}  // namespace stem
