// From global to shared memory, without the detour through registers where alignment allows.
#pragma once

#include "platform.cuh"

namespace stem {

// A tensor [B, h, rows, width] whose last size is contiguous; it is walked by lead = b h + head.
template <typename T>
struct View {
  const T* p;
  int64_t stride_b, stride_h, stride_n;
  int heads, width;
  bool vectors;    // every row begins at a multiple of 16 bytes
  int64_t first = 0;  // the lead that is called 0

  __device__ int64_t offset(int64_t lead) const {
    lead += first;
    return lead / heads * stride_b + lead % heads * stride_h;
  }
  __device__ const T* at(int64_t lead) const { return p + offset(lead); }

  // From row `row` on, of the leads from `lead` on.
  View from(int64_t lead, int64_t row) const {
    View part = *this;
    part.p += row * stride_n;
    part.first += lead;
    return part;
  }
};

// How much of its attention a query keeps where two maps are blended: the mask [B, n], or what is
// left of it. Null: all.
struct Shares {
  const float* p = nullptr;
  int64_t stride_b = 0;
  int heads = 1;
  bool rest = false;
  int64_t first = 0;  // the lead that is called 0

  __device__ float of(int64_t lead, int64_t n) const {
    if (p == nullptr) return 1.0f;
    const float share = p[(lead + first) / heads * stride_b + n];
    return rest ? 1.0f - share : share;
  }

  // From token `n` on, of the leads from `lead` on.
  Shares from(int64_t lead, int64_t n) const {
    Shares part = *this;
    if (p != nullptr) part.p += n;
    part.first += lead;
    return part;
  }
};

template <typename T>
View<T> view(
    const T* p, int64_t stride_b, int64_t stride_h, int64_t stride_n, int heads, int width) {
  auto fits = [](int64_t stride) { return stride * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  bool vectors = reinterpret_cast<uintptr_t>(p) % 16 == 0 && fits(stride_b) && fits(stride_h) &&
                 fits(stride_n);
  return {p, stride_b, stride_h, stride_n, heads, width, vectors};
}

// Copies SIZE bytes, of which all but the first `bytes` become zero.
template <int SIZE>
__device__ inline void copy_async(void* b, const void* p, int bytes) {
#ifdef STEM_EMULATOR
  emulator::copy_async(b, p, SIZE, bytes);
#else
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(b));
  if constexpr (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(p), "r"(bytes)
                 : "memory");
  } else {
    static_assert(SIZE == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(address), "l"(p), "r"(bytes)
                 : "memory");
  }
#endif
}

__device__ inline void copy_commit() {
#ifdef STEM_EMULATOR
  emulator::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most PENDING of this thread's committed groups are on their way.
template <int PENDING>
__device__ inline void copy_wait() {
#ifdef STEM_EMULATOR
  emulator::copy_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// A row of a tile in shared memory is eight 16-bit numbers longer than it need be, so that the
// eight rows that ldmatrix reads at once lie in different banks: an odd number of 16 bytes.
__host__ __device__ constexpr int pitch_of(int width) { return width + 8; }

// Rows 0 ... `rows` - 1 of p_rows, `width` numbers each, into a tile [ROWS, WIDTH] that is zero
// elsewhere. Complete after a commit and a wait.
template <int ROWS, int WIDTH, typename T>
__device__ inline void load_rows(
    T* b_tile, const T* p_rows, int64_t stride, int rows, int width, bool vectors, int thread,
    int threads) {
  static_assert(sizeof(T) == 2 && WIDTH % 16 == 0);
  constexpr int VECTORS = WIDTH / 8;
  for (int i = thread; i < ROWS * VECTORS; i += threads) {
    int row = i / VECTORS, column = i % VECTORS * 8;
    T* b = b_tile + row * pitch_of(WIDTH) + column;
    int left = row < rows ? smaller(8, larger(0, width - column)) : 0;
    const T* p = left > 0 ? p_rows + row * stride + column : p_rows;
    if (vectors) {
      copy_async<16>(b, p, left * 2);
    } else {
#pragma unroll 1
      for (int j = 0; j < 8; ++j) b[j] = j < left ? p[j] : narrow<T>(0.0f);
    }
  }
}

}  // namespace stem
