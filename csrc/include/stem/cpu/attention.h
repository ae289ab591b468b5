// Attention of queries to a few bases, kPanel queries at a time.
//
// Per (query, base) pair: 2 * (width + value_width) FLOPs in two products, one exponential. Lanes
// are queries, so the softmax needs no reduction over lanes and no size is padded but the last
// panel's queries. A panel's weights [bases, kPanel] (32 KiB for 256 bases) stay in cache; key and
// value of the head are packed once per range of queries and stay in the second-level cache.
#pragma once

#include "convert.h"
#include "exp.h"
#include "gemm.h"

namespace stem::cpu::STEM_ISA {

typedef float Four __attribute__((vector_size(16)));
typedef float LooseFour __attribute__((vector_size(16), aligned(4), may_alias));

// to[c, r] = from[r, c] for a 4 x 4 block.
STEM_INLINE void transpose_block(const float* from, int64_t from_stride, float* to,
                                 int64_t to_stride) {
#if defined(__clang__)
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_stride + r] = from[r * from_stride + c];
#else
  typedef int32_t Pick __attribute__((vector_size(16)));
  Four rows[4], mixed[4];
  for (int r = 0; r < 4; ++r)
    rows[r] = *reinterpret_cast<const LooseFour*>(from + r * from_stride);
  for (int r = 0; r < 2; ++r) {
    mixed[2 * r] = __builtin_shuffle(rows[2 * r], rows[2 * r + 1], Pick{0, 4, 1, 5});
    mixed[2 * r + 1] = __builtin_shuffle(rows[2 * r], rows[2 * r + 1], Pick{2, 6, 3, 7});
  }
  for (int c = 0; c < 4; ++c) {
    const Pick pick = c % 2 == 0 ? Pick{0, 1, 4, 5} : Pick{2, 3, 6, 7};
    *reinterpret_cast<LooseFour*>(to + c * to_stride) =
        __builtin_shuffle(mixed[c / 2], mixed[2 + c / 2], pick);
  }
#endif
}

// to[c, r] = from[r, c].
static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
                      float* to, int64_t to_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4)
    for (int64_t c = 0; c < whole_columns; c += 4)
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = from[r * from_stride + c];
}

static int64_t attention_scratch(const AttentionSizes& sizes) {
  const int64_t widest =
      sizes.width > sizes.value_width ? sizes.width : sizes.value_width;
  return sizes.bases * (sizes.width + sizes.value_width + 1) + kPanel * (sizes.bases + 2 * widest) +
         sizes.bases * widest;
}

// logits [bases, kPanel] -> 2^(logit + bias - the query's largest), in place; inverse [kPanel]:
// one over each query's sum, NaN where every base is excluded. bias [bases], or null.
static void weigh_columns(int64_t bases, const float* bias, float* logits, float* inverse) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    float* column = logits + lane;
    // Four maxima side by side, or the loop would wait for each.
    Vec most[4];
    for (Vec& m : most) m = broadcast(-__builtin_inff());
    for (int64_t base = 0; base < bases; ++base) {
      const Vec logit = load(column + base * kPanel) + (bias ? bias[base] : 0.0f);
      store(column + base * kPanel, logit);
      most[base % 4] = larger(logit, most[base % 4]);
    }
    const Vec shift = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    Vec sum = {};
    for (int64_t base = 0; base < bases; ++base) {
      const Vec weight = exp2_of_nonpositive(load(column + base * kPanel) - shift);
      store(column + base * kPanel, weight);
      sum += weight;
    }
    store(inverse + lane, 1.0f / sum);
  }
}

static void attention(const AttentionSizes& sizes, const Rows& query, const Rows& key,
                      const Rows& value, const float* bias, int64_t bias_stride, float scale,
                      int64_t first, int64_t last, void* out, int64_t out_stride,
                      float* scratch) {
  constexpr float kLog2E = 1.44269504f;
  const int64_t bases = sizes.bases, width = sizes.width, value_width = sizes.value_width;
  const int64_t widest = width > value_width ? width : value_width;
  float* packed_key = scratch;                            // [blocks of bases, width, rows]
  float* packed_value = packed_key + bases * width;       // [blocks of channels, bases, rows]
  float* shifts = packed_value + bases * value_width;     // [bases]: the bias, in base 2
  float* logits = shifts + bases;                         // [bases, kPanel]
  float* by_token = logits + bases * kPanel;              // [kPanel, widest]
  float* by_channel = by_token + kPanel * widest;         // [widest, kPanel]
  float* rows = by_channel + kPanel * widest;             // [bases, widest]

  for (int64_t base = 0; base < bases; ++base) load_row(key, base, width, rows + base * width);
  for (int64_t block = 0; block < num_blocks(bases); ++block) {
    const int64_t start = block_start(bases, block), count = block_start(bases, block + 1) - start;
    for (int64_t channel = 0; channel < width; ++channel)
      for (int64_t i = 0; i < count; ++i)
        packed_key[start * width + channel * count + i] =
            rows[(start + i) * width + channel] * (scale * kLog2E);
  }
  for (int64_t base = 0; base < bases; ++base) {
    load_row(value, base, value_width, rows + base * value_width);
    shifts[base] = 1.0f;
  }
  pack(value_width, bases, rows, value_width, shifts, packed_value);
  if (bias)
    for (int64_t base = 0; base < bases; ++base) shifts[base] = bias[base * bias_stride] * kLog2E;

  for (int64_t begin = first; begin < last; begin += kPanel) {
    const int64_t count = smaller(kPanel, last - begin);
    for (int64_t i = 0; i < kPanel * width; ++i) by_channel[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i) load_row(query, begin + i, width, by_token + i * width);
    transpose(by_token, width, count, width, by_channel, kPanel);
    multiply_packed(bases, width, packed_key, by_channel, logits, false);
    float inverse[kPanel];
    weigh_columns(bases, bias ? shifts : nullptr, logits, inverse);
    multiply_packed(value_width, bases, packed_value, logits, by_channel, false);
    for (int64_t channel = 0; channel < value_width; ++channel)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        float* p = by_channel + channel * kPanel + lane;
        store(p, load(p) * load(inverse + lane));
      }
    transpose(by_channel, kPanel, value_width, count, by_token, value_width);
    for (int64_t i = 0; i < count; ++i)
      store_row(by_token + i * value_width, value_width, query.dtype, out,
                (begin + i) * out_stride);
  }
}

}  // namespace stem::cpu::STEM_ISA
