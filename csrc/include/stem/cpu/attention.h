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

constexpr float kLog2E = 1.44269504f;

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

STEM_INLINE int64_t widest(const AttentionSizes& sizes) {
  return sizes.width > sizes.value_width ? sizes.width : sizes.value_width;
}

// What attention by one or two maps works in.
struct AttentionScratch {
  float* packed_value;  // [blocks of channels, bases, rows]
  float* shifts;        // [bases]: the bias, in base 2
  float* by_token;      // [kPanel, widest]
  float* by_channel;    // [width, kPanel]
  float* outputs;       // [value_width, kPanel]
  float* rows;          // [bases, widest]
  float* packed_key[2];  // [blocks of bases, width, rows]
  float* logits[2];      // [bases, kPanel]

  AttentionScratch(const AttentionSizes& sizes, int maps, float* scratch) {
    const int64_t bases = sizes.bases, wide = widest(sizes);
    auto take = [&](int64_t count) { return (scratch += count) - count; };
    packed_value = take(bases * sizes.value_width);
    shifts = take(bases);
    by_token = take(kPanel * wide);
    by_channel = take(kPanel * sizes.width);
    outputs = take(kPanel * sizes.value_width);
    rows = take(bases * wide);
    for (int map = 0; map < maps; ++map) {
      packed_key[map] = take(bases * sizes.width);
      logits[map] = take(bases * kPanel);
    }
  }

  PackedBases bases(int map, bool with_bias) const {
    return {packed_key[map], packed_value, with_bias ? shifts : nullptr};
  }
};

static int64_t attention_scratch(const AttentionSizes& sizes, int maps) {
  const int64_t bases = sizes.bases, wide = widest(sizes);
  return bases * (sizes.value_width + 1 + wide) +
         kPanel * (wide + sizes.width + sizes.value_width) + maps * bases * (sizes.width + kPanel);
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

// Only -inf excludes a base: the lowest finite bias must not become it.
STEM_INLINE float in_base_2(float bias) {
  constexpr float kLargest = 0x1p127f;
  const float scaled = bias * kLog2E;
  if (__builtin_isinf(bias)) return bias;
  return scaled > kLargest ? kLargest : scaled < -kLargest ? -kLargest : scaled;
}

static void pack_key(const AttentionSizes& sizes, const Rows& key, float factor, float* rows,
                     float* packed) {
  const int64_t bases = sizes.bases, width = sizes.width;
  for (int64_t base = 0; base < bases; ++base) load_row(key, base, width, rows + base * width);
  for (int64_t block = 0; block < num_blocks(bases); ++block) {
    const int64_t start = block_start(bases, block), count = block_start(bases, block + 1) - start;
    for (int64_t channel = 0; channel < width; ++channel)
      for (int64_t i = 0; i < count; ++i)
        packed[start * width + channel * count + i] = rows[(start + i) * width + channel] * factor;
  }
}

// Values, and where there is a bias, that in base 2 with what is finite kept so; rows [bases,
// value_width] is scratch, shifts [bases] is written in any case.
static void pack_value(const AttentionSizes& sizes, const Rows& value, const float* bias,
                       int64_t bias_stride, float* rows, float* packed, float* shifts) {
  const int64_t bases = sizes.bases, width = sizes.value_width;
  for (int64_t base = 0; base < bases; ++base) {
    load_row(value, base, width, rows + base * width);
    shifts[base] = 1.0f;
  }
  pack(width, bases, rows, width, shifts, packed);
  if (bias)
    for (int64_t base = 0; base < bases; ++base) shifts[base] = in_base_2(bias[base * bias_stride]);
}

// by_channel [width, kPanel] <- `count` queries from `begin` on, and zeros; by_token is scratch.
static void load_queries(const Rows& query, int64_t begin, int64_t count, int64_t width,
                         float* by_token, float* by_channel) {
  for (int64_t i = 0; count < kPanel && i < kPanel * width; ++i) by_channel[i] = 0.0f;
  for (int64_t i = 0; i < count; ++i) load_row(query, begin + i, width, by_token + i * width);
  transpose(by_token, width, count, width, by_channel, kPanel);
}

// logits [bases, kPanel] <- weights of queries [width, kPanel], undivided; inverse as
// weigh_columns.
static void weigh_queries(const AttentionSizes& sizes, const PackedBases& bases,
                          const float* by_channel, float* logits, float* inverse) {
  multiply_packed(sizes.bases, sizes.width, bases.key, by_channel, logits, false);
  weigh_columns(sizes.bases, bases.shifts, logits, inverse);
}

// outputs [value_width, kPanel] <- weights times the values, and each query's factor where the
// weights lack it.
static void weigh_values(const AttentionSizes& sizes, const float* packed_value,
                         const float* weights, const float* factors, float* outputs) {
  multiply_packed(sizes.value_width, sizes.bases, packed_value, weights, outputs, false);
  for (int64_t channel = 0; factors && channel < sizes.value_width; ++channel)
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      float* p = outputs + channel * kPanel + lane;
      store(p, load(p) * load(factors + lane));
    }
}

// What a correction adds to the outputs of queries [width, kPanel], which lose their mean.
static void correct_outputs(const AttentionSizes& sizes, const Correction& correction,
                            float* by_channel, float* outputs) {
  const float* constant = correction.matrix + sizes.width * correction.stride;
  for (int64_t i = 0; i < sizes.width; ++i)
    for (int64_t lane = 0; lane < kPanel; ++lane)
      by_channel[i * kPanel + lane] -= correction.mean[i];
  for (int64_t i = 0; i < sizes.value_width; ++i)
    for (int64_t lane = 0; lane < kPanel; ++lane) outputs[i * kPanel + lane] += constant[i];
  multiply_transposed(sizes.value_width, sizes.width, correction.matrix, correction.stride,
                      by_channel, outputs, true);
}

// outputs [value_width, kPanel] <- attention of queries [width, kPanel], which are not kept;
// logits [bases, kPanel] is scratch.
static void attend_panel(const AttentionSizes& sizes, const PackedBases& bases,
                         const Correction& correction, float* logits, float* by_channel,
                         float* outputs) {
  float inverse[kPanel];
  weigh_queries(sizes, bases, by_channel, logits, inverse);
  weigh_values(sizes, bases.value, logits, inverse, outputs);
  if (correction.matrix) correct_outputs(sizes, correction, by_channel, outputs);
}

static void store_outputs(const AttentionSizes& sizes, DType dtype, int64_t begin, int64_t count,
                          void* out, int64_t out_stride, const AttentionScratch& scratch) {
  const int64_t width = sizes.value_width;
  transpose(scratch.outputs, kPanel, width, count, scratch.by_token, width);
  for (int64_t i = 0; i < count; ++i)
    store_row(scratch.by_token + i * width, width, dtype, out, (begin + i) * out_stride);
}

static void attention(const AttentionSizes& sizes, const AttentionMap& map, const Rows& value,
                      const float* bias, int64_t bias_stride, const Correction& correction,
                      float scale, int64_t first, int64_t last, void* out, int64_t out_stride,
                      float* memory) {
  const AttentionScratch scratch(sizes, 1, memory);
  pack_key(sizes, map.key, scale * kLog2E, scratch.rows, scratch.packed_key[0]);
  pack_value(sizes, value, bias, bias_stride, scratch.rows, scratch.packed_value, scratch.shifts);
  const PackedBases bases = scratch.bases(0, bias != nullptr);
  for (int64_t begin = first; begin < last; begin += kPanel) {
    const int64_t count = smaller(kPanel, last - begin);
    load_queries(map.query, begin, count, sizes.width, scratch.by_token, scratch.by_channel);
    attend_panel(sizes, bases, correction, scratch.logits[0], scratch.by_channel,
                 scratch.outputs);
    store_outputs(sizes, map.query.dtype, begin, count, out, out_stride, scratch);
  }
}

// target <- share * target * inverse + (1 - share) * source * inverse, [bases, kPanel]. What has
// no share may be anything.
static void blend_columns(int64_t bases, const float* share, const float (&inverse)[2][kPanel],
                          float* target, const float* source) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const Vec part = load(share + lane);
    const Vec of_target = part * load(inverse[0] + lane);
    const Vec of_source = (1.0f - part) * load(inverse[1] + lane);
    for (int64_t base = 0; base < bases; ++base) {
      float* p = target + base * kPanel + lane;
      const Vec left = part == 0.0f ? Vec{} : load(p) * of_target;
      const Vec right =
          part == 1.0f ? Vec{} : load(source + base * kPanel + lane) * of_source;
      store(p, left + right);
    }
  }
}

// Both maps weight the same values, so that their weights are blended and one product is enough.
// A map in which no query of a panel has a share is left out.
static void blended_attention(const AttentionSizes& sizes, const AttentionMap (&maps)[2],
                              const Rows& value, const float* mask, const float* bias,
                              int64_t bias_stride, float scale, int64_t first, int64_t last,
                              void* out, int64_t out_stride, float* memory) {
  const AttentionScratch scratch(sizes, 2, memory);
  for (int map = 0; map < 2; ++map)
    pack_key(sizes, maps[map].key, scale * kLog2E, scratch.rows, scratch.packed_key[map]);
  pack_value(sizes, value, bias, bias_stride, scratch.rows, scratch.packed_value, scratch.shifts);
  for (int64_t begin = first; begin < last; begin += kPanel) {
    const int64_t count = smaller(kPanel, last - begin);
    float share[kPanel] = {}, inverse[2][kPanel];
    bool needed[2] = {};
    for (int64_t i = 0; i < count; ++i) {
      share[i] = mask[begin + i];
      needed[0] |= share[i] != 0.0f;
      needed[1] |= share[i] != 1.0f;
    }
    for (int map = 0; map < 2; ++map) {
      if (!needed[map]) continue;
      load_queries(maps[map].query, begin, count, sizes.width, scratch.by_token,
                   scratch.by_channel);
      weigh_queries(sizes, scratch.bases(map, bias != nullptr), scratch.by_channel,
                    scratch.logits[map], inverse[map]);
    }
    blend_columns(sizes.bases, share, inverse, scratch.logits[0], scratch.logits[1]);
    weigh_values(sizes, scratch.packed_value, scratch.logits[0], nullptr, scratch.outputs);
    store_outputs(sizes, maps[0].query.dtype, begin, count, out, out_stride, scratch);
  }
}

}  // namespace stem::cpu::STEM_ISA
