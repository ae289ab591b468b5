// Runs CUDA kernels on a CPU, one block after the other, so that their indices, layouts and
// barriers can be tested where there is no GPU. A block's threads are fibers: each runs until it
// waits for its warp or its block, one warp as far as it gets before the next, so that a missing
// barrier shows. Shared memory begins as NaN. cp.async arrives when it is waited for, or, in every
// other pair of blocks, at once.
//
// Says nothing about speed, nor about what hardware does between two barriers.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define STEM_SHARED(name) unsigned char* name = emulator::shared_memory()

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint4 {
  uint32_t x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __half __float2half_rn(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  __half result;
  std::memcpy(&result.bits, &rounded, 2);
  return result;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
};

struct Fiber {
  dim3 index{0, 0, 0};
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;  // done with the block
  const unsigned* waits_for = nullptr;  // a generation that must no longer be `seen`
  unsigned seen = 0;
  std::vector<Copy> pending;             // not committed
  std::vector<std::vector<Copy>> groups; // committed, oldest first
};

// What the 32 lanes hand to one another at a collective instruction.
struct Warp {
  unsigned generation = 0, arrived = 0;
  const char* kind = nullptr;
  uint32_t in[32][10];
  const void* rows[32];
  uint32_t out[32][4];
};

extern Fiber* current;
extern dim3 block, grid, threads;

void run(const char* name, dim3 grid, int threads, int64_t shared, std::function<void()> kernel);
const char* last_kernel();  // that was launched
unsigned char* shared_memory();
[[noreturn]] void fail(const std::string& what);

Warp& warp_of_current();
int lane_of_current();
// Waits for the other lanes; the last one computes, then all go on.
void meet(const char* kind, void (*compute)(Warp&));
void block_barrier();

void copy_async(void* to, const void* from, int size, int bytes);
void copy_commit();
void copy_wait(int pending);
void ldmatrix_x4(uint32_t (&r)[4], const void* p_row, bool transposed);

void multiply_half(Warp& warp);
void multiply_bfloat16(Warp& warp);

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp& warp = warp_of_current();
  uint32_t* in = warp.in[lane_of_current()];
  std::memcpy(in, a, 16);
  in[4] = b0;
  in[5] = b1;
  std::memcpy(in + 6, d, 16);
  meet("mma", sizeof(T) == 2 && std::is_same<T, __half>::value ? multiply_half : multiply_bfloat16);
  std::memcpy(d, warp.out[lane_of_current()], 16);
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)
#define blockDim (emulator::threads)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::meet("syncwarp", nullptr); }

float __shfl_xor_sync(unsigned mask, float x, int bit);
int __shfl_xor_sync(unsigned mask, int x, int bit);
