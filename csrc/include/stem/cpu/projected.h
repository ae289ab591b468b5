// A self-attention of tokens to a few bases between its two projections, some panels of tokens at
// a time.
//
// Per token: 2 * (channels + outputs) * inner FLOPs for the projections, and those of attention.
// Lanes are tokens from the first transpose to the last, so that each product's result is the next
// one's operand as it lies: queries and attended values stay in the second-level cache (of 1 MiB, up
// to some 1000 channels), and weights are read from the third once for all panels of a task.
#pragma once

#include "attention.h"

namespace stem::cpu::STEM_ISA {

// Channels that are summed in one go: sums of sums round less than one long sum.
constexpr int64_t kDepth = 320;
// Floats of a task's panels, which two arrays hold: 384 KiB of a second-level cache. For fewer
// tokens than kFewest the weights' way from the third-level cache takes longer than the products:
// at 1280 channels, on an EPYC (Zen 4), 32 tokens a task took 1.18 times the time of 96.
constexpr int64_t kHeld = 98304, kFewest = 96, kMost = 256;

STEM_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

// The widest that lies in each of the two arrays of panels: first the tokens and then the attended
// values, first the queries and then the outputs.
STEM_INLINE int64_t rows_before(const ProjectedSizes& sizes) {
  return larger_of(sizes.channels, sizes.heads * sizes.attention.value_width);
}
STEM_INLINE int64_t rows_after(const ProjectedSizes& sizes) {
  return larger_of(sizes.outputs, sizes.heads * sizes.attention.width);
}

static int64_t projected_panels(const ProjectedSizes& sizes) {
  const int64_t panels = kHeld / (kPanel * (rows_before(sizes) + rows_after(sizes)));
  return larger_of(kFewest / kPanel, smaller(kMost / kPanel, panels));
}

static int64_t projected_tokens(const ProjectedSizes& sizes) {
  return kPanel * projected_panels(sizes);
}

static int64_t projected_scratch(const ProjectedSizes& sizes) {
  const int64_t before = rows_before(sizes), after = rows_after(sizes);
  return kPanel * (projected_panels(sizes) * (before + after) + larger_of(before, after) +
                   sizes.attention.bases);
}

// A block of weights [rows, depth] -> its place among packed [blocks, depth, rows of the block];
// scratch [kRows, depth].
static void pack_weight(const Rows& weight, int64_t rows, int64_t depth, int64_t block,
                        float* packed, float* scratch) {
  const int64_t first = block_start(rows, block), count = block_start(rows, block + 1) - first;
  for (int64_t i = 0; i < count; ++i) load_row(weight, first + i, depth, scratch + i * depth);
  transpose(scratch, depth, count, depth, packed + first * depth, count);
}

static void pack_bases(const AttentionSizes& sizes, const Rows& key, const Rows& value,
                       const float* bias, int64_t bias_stride, float scale, float* packed_key,
                       float* packed_value, float* shifts, float* rows) {
  pack_key(sizes, key, scale * kLog2E, rows, packed_key);
  pack_value(sizes, value, bias, bias_stride, rows, packed_value, shifts);
}

// to [panels, to_rows, kPanel] = packed weights [rows, depth] times from [panels, from_rows,
// kPanel], plus bias [rows], or null.
static void project(int64_t rows, int64_t depth, const float* packed, const float* bias,
                    int64_t panels, const float* from, int64_t from_rows, float* to,
                    int64_t to_rows) {
  const int64_t chunks = larger_of(1, (depth + kDepth - 1) / kDepth);  // of no channels, zeros
  for (int64_t block = 0; block < num_blocks(rows); ++block) {
    const int64_t first = block_start(rows, block), count = block_start(rows, block + 1) - first;
    for (int64_t panel = 0; bias && panel < panels; ++panel)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t lane = 0; lane < kPanel; lane += kLanes)
          store(to + (panel * to_rows + first + i) * kPanel + lane, broadcast(bias[first + i]));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = depth * chunk / chunks, end = depth * (chunk + 1) / chunks;
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply_rows<kRows, true>(count, end - begin, packed + first * depth + begin * count,
                                   count, from + (panel * from_rows + begin) * kPanel,
                                   to + (panel * to_rows + first) * kPanel,
                                   bias != nullptr || chunk > 0);
    }
  }
}

// Tokens first ... last - 1, which are at most projected_panels panels, -> rows of out.
static void projected_attention(const ProjectedSizes& sizes, const ProjectedOperands& given,
                                const Rows& tokens, int64_t first, int64_t last, void* out,
                                float* memory) {
  const AttentionSizes& attention = sizes.attention;
  const int64_t before = rows_before(sizes), after = rows_after(sizes);
  const int64_t inner = sizes.heads * attention.width, heads = sizes.heads;
  const int64_t attended = heads * attention.value_width;
  const int64_t panels = (last - first + kPanel - 1) / kPanel;
  float* by_token = memory;                               // [kPanel, before or after]
  float* logits = by_token + kPanel * larger_of(before, after);
  float* held = logits + kPanel * attention.bases;        // [panels, before, kPanel]
  float* made = held + panels * before * kPanel;          // [panels, after, kPanel]
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = first + panel * kPanel, count = smaller(kPanel, last - begin);
    float* to = held + panel * before * kPanel;
    for (int64_t i = 0; count < kPanel && i < sizes.channels * kPanel; ++i) to[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i)
      load_row(tokens, begin + i, sizes.channels, by_token + i * sizes.channels);
    transpose(by_token, sizes.channels, count, sizes.channels, to, kPanel);
  }
  project(inner, sizes.channels, given.query_weight, given.query_bias, panels, held, before, made,
          after);
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t panel = 0; panel < panels; ++panel)
      attend_panel(attention, given.bases[head], given.corrections[head], logits,
                   made + (panel * after + head * attention.width) * kPanel,
                   held + (panel * before + head * attention.value_width) * kPanel);
  project(sizes.outputs, attended, given.output_weight, given.output_bias, panels, held, before,
          made, after);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t begin = first + panel * kPanel, count = smaller(kPanel, last - begin);
    transpose(made + panel * after * kPanel, kPanel, sizes.outputs, count, by_token,
              sizes.outputs);
    for (int64_t i = 0; i < count; ++i)
      store_row(by_token + i * sizes.outputs, sizes.outputs, tokens.dtype, out,
                (begin + i) * sizes.outputs);
  }
}

}  // namespace stem::cpu::STEM_ISA
