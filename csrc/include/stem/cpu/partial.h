// Exact attention of a few queries to many keys, kKeys keys and kPanel queries at a time.
//
// Per (query, key) pair: 2 * (width + value_width) FLOPs, one exponential. Lanes are queries, as in
// attention.h, but it is the keys that pass by: a block of them is read once for all queries, and
// its weights [kKeys, kPanel] stay in the first-level cache. What earlier blocks gave is rescaled.
#pragma once

#include "attention.h"

namespace stem::cpu::STEM_ISA {

constexpr int64_t kKeys = 128;

STEM_INLINE int64_t query_panels(const PartialSizes& sizes) {
  return (sizes.queries + kPanel - 1) / kPanel;
}

static int64_t partial_scratch(const PartialSizes& sizes) {
  return query_panels(sizes) * sizes.width * kPanel + kKeys * (sizes.width + sizes.value_width) +
         kKeys * kPanel + kPanel * sizes.width;
}

// logits [keys, kPanel] -> weights, in place; the state is that of the keys so far and these, but
// for their values. Of the left `lanes` alone.
static void weigh_keys(int64_t keys, int64_t value_width, int64_t lanes, float* logits,
                       float* state) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    float* column = logits + lane;
    float* sums = state + 2 * kPanel + lane;
    const Vec before = load(state + lane);
    Vec most[4] = {before, before, before, before};
    for (int64_t key = 0; key < keys; ++key)
      most[key % 4] = larger(load(column + key * kPanel), most[key % 4]);
    const Vec peak = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    // -inf - -inf is NaN, and a later key may have a logit that is not -inf.
    const Vec shift = peak == -__builtin_inff() ? Vec{} : peak;
    const Vec shrunk = exp2_of_nonpositive(before - shift);
    Vec sum = {};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec weight = exp2_of_nonpositive(load(column + key * kPanel) - shift);
      store(column + key * kPanel, weight);
      sum += weight;
    }
    store(state + lane, peak);
    store(state + kPanel + lane, load(state + kPanel + lane) * shrunk + sum);
    for (int64_t i = 0; i < value_width; ++i)
      store(sums + i * kPanel, load(sums + i * kPanel) * shrunk);
  }
}

static void partial_attention(const PartialSizes& sizes, const AttentionMap& map,
                              const Rows& value, float scale, int64_t first, int64_t last,
                              float* states, float* scratch) {
  constexpr float kLog2E = 1.44269504f;
  const int64_t width = sizes.width, value_width = sizes.value_width;
  const int64_t panels = query_panels(sizes), state_size = sizes.rows() * kPanel;
  float* queries = scratch;                           // [panels, width, kPanel]
  float* keys = queries + panels * width * kPanel;    // [kKeys, width]
  float* values = keys + kKeys * width;               // [kKeys, value_width]
  float* logits = values + kKeys * value_width;       // [kKeys, kPanel]
  float* by_token = logits + kKeys * kPanel;          // [kPanel, width]
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t count = smaller(kPanel, sizes.queries - panel * kPanel);
    float* by_channel = queries + panel * width * kPanel;
    for (int64_t i = 0; i < width * kPanel; ++i) by_channel[i] = 0.0f;
    for (int64_t i = 0; i < count; ++i)
      load_row(map.query, panel * kPanel + i, width, by_token + i * width);
    transpose(by_token, width, count, width, by_channel, kPanel);
    for (int64_t i = 0; i < width * kPanel; ++i) by_channel[i] *= scale * kLog2E;
    float* state = states + panel * state_size;
    for (int64_t i = 0; i < state_size; ++i) state[i] = i < kPanel ? -__builtin_inff() : 0.0f;
  }
  for (int64_t begin = first; begin < last; begin += kKeys) {
    const int64_t count = smaller(kKeys, last - begin);
    for (int64_t i = 0; i < count; ++i) load_row(map.key, begin + i, width, keys + i * width);
    for (int64_t i = 0; i < count; ++i)
      load_row(value, begin + i, value_width, values + i * value_width);
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* state = states + panel * state_size;
      multiply_strided(count, width, keys, width, queries + panel * width * kPanel, logits, false);
      weigh_keys(count, value_width, kPanel, logits, state);
      multiply_transposed(value_width, count, values, value_width, logits, state + 2 * kPanel,
                          true);
    }
  }
}

}  // namespace stem::cpu::STEM_ISA
