// Tensor cores, by the instructions that every chip from sm_80 on has.
//
// Fragments of mma.m16n8k16, for lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//
//   A [16, 16]  register 0: row g,     columns 2t, 2t+1     2: row g,     columns 2t+8, 2t+9
//               register 1: row g + 8, columns 2t, 2t+1     3: row g + 8, columns 2t+8, 2t+9
//   B [16, 8]   register 0: rows 2t, 2t+1, column g         1: rows 2t+8, 2t+9, column g
//   C [16, 8]   0, 1: row g, columns 2t, 2t+1               2, 3: row g + 8, columns 2t, 2t+1
//
// So the C of two neighbouring [16, 8] tiles is, narrowed and packed, one A of [16, 16].
//
// ldmatrix.x4 reads four 8 x 8 matrices; lanes 8 i ... 8 i + 7 name the rows of the i-th, and lane
// 4 g + t gets of each matrix row g, columns 2t, 2t+1, or, transposed, rows 2t, 2t+1, column g.
#pragma once

#include "platform.cuh"

namespace stem {

constexpr int MMA_DEPTH = 16;  // products that one addition to a sum takes

// d += a b
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef STEM_EMULATOR
  emulator::mma_m16n8k16<T>(d, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

template <bool TRANSPOSED>
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* p_row) {
#ifdef STEM_EMULATOR
  emulator::ldmatrix_x4(r, p_row, TRANSPOSED);
#else
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p_row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// In each of the three, b_tile points at the upper left corner of the 16 x 16 part to read.

// A of [rows, k], as it lies.
template <int PITCH, typename T>
__device__ inline void load_a(uint32_t (&a)[4], const T* b_tile, int lane) {
  ldmatrix_x4<false>(a, b_tile + (lane % 16) * PITCH + (lane / 16) * 8);
}

// A of rows p_rows, in global memory, from column `first` on; zero past `rows` and `width`. Pairs are
// read at once if every one is aligned.
template <typename T>
__device__ inline void load_a_pairs(
    uint32_t (&a)[4], const T* p_rows, int64_t stride, int first, int rows, int width, bool pairs,
    int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, column = first + lane % 4 * 2 + i / 2 * 8;
    const T* p = p_rows + row * stride + column;
    a[i] = 0;
    if (row >= rows || column >= width) continue;
    if (pairs) {
      a[i] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      a[i] = pack<T>(widen(p[0]), column + 1 < width ? widen(p[1]) : 0.0f);
    }
  }
}

// B of [k, 16 columns] from a tile that lies as [columns, k]: the first eight columns' fragment in
// b[0], b[1], the others' in b[2], b[3].
template <int PITCH, typename T>
__device__ inline void load_b_by_column(uint32_t (&b)[4], const T* b_tile, int lane) {
  ldmatrix_x4<false>(b, b_tile + (lane % 8 + lane / 16 * 8) * PITCH + (lane / 8 % 2) * 8);
}

// B of [k, 16 columns] from a tile that lies as [k, columns], likewise.
template <int PITCH, typename T>
__device__ inline void load_b_by_row(uint32_t (&b)[4], const T* b_tile, int lane) {
  ldmatrix_x4<true>(b, b_tile + (lane % 16) * PITCH + (lane / 16) * 8);
}

// Where element (row, column) of a matrix lies that is kept as A fragments, [rows / 16, steps] of
// them with 32 lanes x 8 numbers each: a lane then reads its fragment as 16 neighbouring bytes.
__host__ __device__ inline int64_t fragment_offset(int row, int column, int steps) {
  int lane = row % 8 * 4 + column % 8 / 2;
  int reg = row % 16 / 8 + column % 16 / 8 * 2;
  int64_t fragment = static_cast<int64_t>(row / 16) * steps + column / 16;
  return (fragment * WARP + lane) * 8 + reg * 2 + column % 2;
}

__device__ inline void load_fragment(uint32_t (&a)[4], const uint4* p) {
  const uint4 both = *p;
  a[0] = both.x, a[1] = both.y, a[2] = both.z, a[3] = both.w;
}

}  // namespace stem
