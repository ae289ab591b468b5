// One pass of EM over tokens, a tile at a time, and the update of the bases.
//
// Per (token, base) pair and pass: 4 * width FLOPs in two products, one exponential. On an EPYC
// (Zen 5, AVX-512, one core) the products run at 238 of its 243 GFLOP/s, and an exponential with
// its share of the softmax takes 0.14 ns: at width 40, 80% and 16% of the time; the rest is copying
// tokens.
//
// A tile's weights [panels, tile, kPanel] (112 KiB for 256 bases) go through the second-level cache
// between the three steps and never to memory. Tokens of a tile are rows of the first product and
// depth of the second. The weights are left undivided: the tokens are divided by the softmax's sum
// instead, which is width / bases of the work, and a column of ones beside them makes the mass.
#pragma once

#include "convert.h"
#include "exp.h"
#include "gemm.h"

namespace stem::cpu::STEM_ISA {

constexpr int64_t kTile = 8 * kRows;
// Tiles that are added to one float32 sum before it joins the part's: a long sum rounds as often as
// something is added, each time by more.
constexpr int64_t kTilesPerSum = 128;

STEM_INLINE int64_t num_panels(int64_t bases) { return (bases + kPanel - 1) / kPanel; }

// A row of the tile; 16 floats more keep wide rows from falling on the same lines of the cache.
STEM_INLINE int64_t tile_stride(const EmSizes& sizes) {
  return sizes.columns() + (sizes.columns() >= 256 ? 16 : 0);
}

static int64_t em_scratch(const EmSizes& sizes) {
  const int64_t weights = num_panels(sizes.bases) * kPanel;
  return kTile * (tile_stride(sizes) + weights + sizes.columns() + 1) + sizes.columns() * weights;
}

// logits [panels, kTile, kPanel] -> 2^(logit - the token's largest), in place; inverse [count]:
// one over each token's sum. Lanes of the last panel beyond `bases` get 0.
static void weigh(int64_t count, int64_t bases, float* logits, float* inverse) {
  const int64_t panels = num_panels(bases), spacing = kTile * kPanel;
  float padding[kPanel];
  for (int64_t lane = 0; lane < kPanel; ++lane)
    padding[lane] = (panels - 1) * kPanel + lane < bases ? 0.0f : -__builtin_inff();
  for (int64_t token = 0; token < count; ++token) {
    float* row = logits + token * kPanel;
    float* end = row + (panels - 1) * spacing;
    store(end, load(end) + load(padding));
    store(end + kLanes, load(end + kLanes) + load(padding + kLanes));
    Vec most = load(row), also = load(row + kLanes);
    for (float* p = row + spacing; p <= end; p += spacing) {
      most = larger(load(p), most);
      also = larger(load(p + kLanes), also);
    }
    const Vec shift = broadcast(largest_lane(larger(most, also)));
    Vec sum = {}, other = {};
    for (float* p = row; p <= end; p += spacing) {
      const Vec left = exp2_of_nonpositive(load(p) - shift);
      const Vec right = exp2_of_nonpositive(load(p + kLanes) - shift);
      store(p, left);
      store(p + kLanes, right);
      sum += left;
      other += right;
    }
    inverse[token] = 1.0f / sum_of_lanes(sum + other);
  }
}

static void add_sums(const float* from, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += kLanes) store(sums + i, load(sums + i) + load(from + i));
}

static void em_pass(const EmSizes& sizes, const Rows& features, const Rows& payload, int64_t first,
                    int64_t last, const float* directions, float* sums, float* scratch) {
  const int64_t panels = num_panels(sizes.bases), width = sizes.width, columns = sizes.columns();
  const int64_t stride = tile_stride(sizes), spacing = kTile * kPanel;
  const int64_t tiles = (last - first + kTile - 1) / kTile;
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  float* weights = scratch;                      // [panels, kTile, kPanel]
  float* tokens = weights + panels * spacing;    // [kTile, stride]: features, 1, payload
  float* packed = tokens + kTile * stride;       // [blocks of columns, kTile, rows of the block]
  float* inverse = packed + kTile * columns;     // [kTile]
  float* some = inverse + kTile;                 // [panels, columns, kPanel]: of kTilesPerSum tiles
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = first + (last - first) * tile / tiles;
    const int64_t count = first + (last - first) * (tile + 1) / tiles - begin;
    for (int64_t token = 0; token < count; ++token) {
      float* row = tokens + token * stride;
      load_row(features, begin + token, width, row);
      row[width] = 1.0f;
      load_row(payload, begin + token, sizes.payload_width, row + width + 1);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t channel = width * chunk / chunks;
      const int64_t depth = width * (chunk + 1) / chunks - channel;
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply_strided(count, depth, tokens + channel, stride,
                         directions + (panel * width + channel) * kPanel,
                         weights + panel * spacing, chunk > 0);
    }
    weigh(count, sizes.bases, weights, inverse);
    pack(columns, count, tokens, stride, inverse, packed);
    float* target = tile < kTilesPerSum ? sums : some;
    for (int64_t panel = 0; panel < panels; ++panel)
      multiply_packed(columns, count, packed, weights + panel * spacing,
                      target + panel * columns * kPanel, tile % kTilesPerSum > 0);
    if (target == some && (tile + 1 == tiles || (tile + 1) % kTilesPerSum == 0))
      add_sums(some, panels * columns * kPanel, sums);
  }
}

static void load_panel(const float* bases, int64_t num_bases, int64_t width, int64_t panel_index,
                       float* panel) {
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const int64_t base = panel_index * kPanel + lane;
    for (int64_t row = 0; row < width; ++row)
      panel[row * kPanel + lane] = base < num_bases ? bases[base * width + row] : 0.0f;
  }
}

static void store_panel(const float* panel, int64_t num_bases, int64_t width, int64_t panel_index,
                        float* bases) {
  const int64_t first = panel_index * kPanel;
  for (int64_t base = first; base < smaller(first + kPanel, num_bases); ++base)
    for (int64_t row = 0; row < width; ++row)
      bases[base * width + row] = panel[row * kPanel + base - first];
}

// In double, rounded once: an error of a base's factor would be one of all its logits, and those
// are in the hundreds.
static void directions(const float* bases, int64_t width, bool normalize, double scale,
                       float* directions) {
  double factors[kPanel] = {};
  for (int64_t row = 0; row < width; ++row)
    for (int64_t lane = 0; lane < kPanel; ++lane)
      factors[lane] += static_cast<double>(bases[row * kPanel + lane]) * bases[row * kPanel + lane];
  for (double& factor : factors)
    factor = normalize ? scale / (__builtin_sqrt(factor) + 1e-4) : scale;
  for (int64_t row = 0; row < width; ++row)
    for (int64_t lane = 0; lane < kPanel; ++lane)
      directions[row * kPanel + lane] =
          static_cast<float>(bases[row * kPanel + lane] * factors[lane]);
}

static void add_parts(float* first, int64_t parts, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Vec total = load(first + i);
    for (int64_t part = 1; part < parts; ++part) total += load(first + part * stride + i);
    store(first + i, total);
  }
}

static void update(const EmSizes& sizes, bool keep_empty, float least_mass, float* sums,
                   float* bases) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    float* p_mass = sums + sizes.width * kPanel + lane;
    const Vec mass = load(p_mass), share = mass + 1e-4f;
    const Vec threshold = broadcast(keep_empty ? least_mass : -1.0f);
    for (int64_t row = 0; row < sizes.width; ++row) {
      const Vec kept = load(bases + row * kPanel + lane);
      const Vec updated = load(sums + row * kPanel + lane) / share;
      store(bases + row * kPanel + lane, mass < threshold ? kept : updated);
    }
    for (int64_t row = sizes.width + 1; row < sizes.columns(); ++row)
      store(sums + row * kPanel + lane, load(sums + row * kPanel + lane) / share);
    store(p_mass, mass < threshold ? Vec{} : mass);
  }
}

}  // namespace stem::cpu::STEM_ISA
