// For every query the key of the largest cosine, kTile queries and kPanel keys at a time.
//
// Per (query, key) pair: 2 * width FLOPs. Keys are scaled and packed once for all queries. Each lane keeps the largest product of its keys so far and the panel that it was in; the
// lanes are compared once, at the end. Every product is summed up in the same order, so that equal
// keys have equal products, of which the first counts.
#pragma once

#include "em.h"

namespace stem::cpu::STEM_ISA {

STEM_INLINE int64_t query_stride(int64_t width) { return width + (width >= 256 ? 16 : 0); }

static int64_t nearest_scratch(int64_t width) { return kTile * (query_stride(width) + 3 * kPanel); }

static void pack_keys(const Rows& keys, const float* factors, int64_t num_keys, int64_t width,
                      int64_t panel_index, float* packed, float* row) {
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t key = panel_index * kPanel + lane;
    const bool there = key < num_keys;
    if (there) load_row(keys, key, width, row);
    const float factor = there ? factors[key] : 0.0f;
    for (int64_t i = 0; i < width; ++i)
      packed[i * kPanel + lane] = there ? row[i] * factor : 0.0f;
  }
}

// The panel's products -> each lane's largest and, where that is new, the panel.
static void keep_largest(int64_t count, int32_t panel, const float* padding, const float* products,
                         float* largest, float* found) {
  const IntVec here = IntVec{} + panel;
  for (int64_t i = 0; i < count * kPanel; i += kLanes) {
    const Vec product = load(products + i) + load(padding + i % kPanel), most = load(largest + i);
    const IntVec better = product > most;  // not >=: of equal ones the first counts
    store(largest + i, better ? product : most);
    const IntVec before = reinterpret_cast<IntVec>(load(found + i));
    store(found + i, reinterpret_cast<Vec>(better ? here : before));
  }
}

static int32_t first_largest(const float* largest, const float* found) {
  float most = -__builtin_inff();
  int32_t best = 0;
  for (int32_t lane = 0; lane < kPanel; ++lane) {
    int32_t panel;
    __builtin_memcpy(&panel, found + lane, 4);
    const int32_t key = panel * kPanel + lane;
    if (largest[lane] > most || (largest[lane] == most && key < best)) {
      most = largest[lane];
      best = key;
    }
  }
  return best;
}

static void nearest(const Rows& query, int64_t num_keys, int64_t width, int64_t first,
                    int64_t last, const float* packed, int32_t* out, float* scratch) {
  const int64_t panels = num_panels(num_keys), stride = query_stride(width);
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  float* tokens = scratch;                    // [kTile, stride]
  float* products = tokens + kTile * stride;  // [kTile, kPanel]
  float* largest = products + kTile * kPanel;
  float* found = largest + kTile * kPanel;    // int32, so that all scratch memory is floats
  float padding[kPanel] = {};
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t count = smaller(kTile, last - begin);
    for (int64_t i = 0; i < count; ++i) load_row(query, begin + i, width, tokens + i * stride);
    for (int64_t i = 0; i < count * kPanel; ++i) largest[i] = -__builtin_inff();
    for (int64_t i = 0; i < count * kPanel; ++i) found[i] = 0.0f;  // the bits of panel 0
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t channel = width * chunk / chunks;
        multiply_strided(count, width * (chunk + 1) / chunks - channel, tokens + channel, stride,
                         packed + (panel * width + channel) * kPanel, products, chunk > 0);
      }
      for (int64_t lane = 0; lane < kPanel; ++lane)
        padding[lane] = panel * kPanel + lane < num_keys ? 0.0f : -__builtin_inff();
      keep_largest(count, static_cast<int32_t>(panel), padding, products, largest, found);
    }
    for (int64_t i = 0; i < count; ++i)
      out[begin + i] = first_largest(largest + i * kPanel, found + i * kPanel);
  }
}

}  // namespace stem::cpu::STEM_ISA
