// One pass of EM over tokens, a tile at a time, and the update of the bases.
//
// Per (token, base) pair and pass: 4 * width FLOPs in two products, one exponential. On an EPYC
// (Zen 5, AVX-512, one core) the products run at 238 of its 243 GFLOP/s, and an exponential with
// its share of the softmax takes 0.14 ns: at width 40, 80% and 16% of the time; the rest is copying
// tokens.
//
// Most weights are 0: at tau = 0.01 a token of a UNet's layer has one to 60 of 256 that are not. A
// tile with few of them adds each to its base alone instead of by the second product.
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

// The weights of a tile that are not 0.
struct Kept {
  uint64_t* lanes;  // [count, lane_words]: kSlot bits for each vector of weights, a bit a lane
  int32_t* ends;    // [bases]: where each base's weights end
  int32_t* tokens;  // [total], base after base, of each base in their order
  float* weights;   // [total], over the token's sum
  int64_t total;
};

constexpr int kSlot = kLanes == 16 ? 16 : 8, kSlots = 64 / kSlot;

STEM_INLINE int64_t lane_words(int64_t bases) {
  return (2 * num_panels(bases) + kSlots - 1) / kSlots;
}

// A base's sums side by side, whole vectors of them.
STEM_INLINE int64_t row_stride(const EmSizes& sizes) {
  return (sizes.columns() + kLanes - 1) / kLanes * kLanes;
}

// How many weights a tile adds one by one: where they take as long as the second product. On an
// EPYC (Zen 4), by AVX-512 as by AVX2, one of R columns takes as long as 2.5 R + 480 of it.
STEM_INLINE int64_t most_kept(const EmSizes& sizes, int64_t count) {
  const int64_t columns = row_stride(sizes);
  return count * sizes.bases * columns * 2 / (5 * columns + 960);
}

static int64_t em_scratch(const EmSizes& sizes) {
  const int64_t weights = num_panels(sizes.bases) * kPanel;
  return kTile * (tile_stride(sizes) + weights + sizes.columns() + 1) + sizes.columns() * weights +
         sizes.bases * row_stride(sizes) + 2 * kTile * lane_words(sizes.bases) + sizes.bases +
         2 * most_kept(sizes, kTile);
}

// logits [panels, kTile, kPanel] -> 2^(logit - the token's largest), in place; inverse [count]:
// one over each token's sum; kept: lanes and total. Lanes of the last panel beyond `bases` get 0
// and are not kept.
static void weigh(int64_t count, int64_t bases, float* logits, float* inverse, Kept& kept) {
  const int64_t panels = num_panels(bases), spacing = kTile * kPanel, words = lane_words(bases);
  float padding[kPanel];
  uint64_t own = 0;  // Lanes of the last panel that are bases; those of a NaN token are all NaN.
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    const bool is_base = (panels - 1) * kPanel + lane < bases;
    padding[lane] = is_base ? 0.0f : -__builtin_inff();
    own |= uint64_t{is_base} << (lane / kLanes * kSlot + lane % kLanes);
  }
  kept.total = 0;
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
    uint64_t* lanes = kept.lanes + token * words;
    uint64_t word = 0;
    int filled = 0;
    for (float* p = row; p <= end; p += spacing) {
      const Vec left = exp2_of_nonpositive(load(p) - shift);
      const Vec right = exp2_of_nonpositive(load(p + kLanes) - shift);
      store(p, left);
      store(p + kLanes, right);
      sum += left;
      other += right;
      const uint64_t lanes_of_panel =
          lanes_not_zero(left) | uint64_t{lanes_not_zero(right)} << kSlot;
      word |= (p == end ? lanes_of_panel & own : lanes_of_panel) << filled;
      filled += 2 * kSlot;
      if (filled == 64 || p == end) {
        *lanes++ = word;
        kept.total += __builtin_popcountll(word);
        word = 0;
        filled = 0;
      }
    }
    inverse[token] = 1.0f / sum_of_lanes(sum + other);
  }
}

// Calls `visit` with the token and the base of each weight that is not 0, token after token.
template <typename Visit>
STEM_INLINE void each_kept(const Kept& kept, int64_t count, int64_t words, const Visit& visit) {
  const uint64_t* lanes = kept.lanes;
  for (int64_t token = 0; token < count; ++token)
    for (int64_t word = 0; word < words; ++word)
      for (uint64_t left = *lanes++; left != 0; left &= left - 1) {
        const int bit = __builtin_ctzll(left);
        visit(token, (word * kSlots + bit / kSlot) * kLanes + bit % kSlot);
      }
}

// Sorts the weights that are not 0 by base.
static void sort_kept(int64_t count, int64_t bases, const float* weights, const float* inverse,
                      Kept& kept) {
  const int64_t words = lane_words(bases), spacing = kTile * kPanel;
  for (int64_t base = 0; base < bases; ++base) kept.ends[base] = 0;
  each_kept(kept, count, words, [&](int64_t, int64_t base) { ++kept.ends[base]; });
  int32_t begin = 0;
  for (int64_t base = 0; base < bases; ++base) {
    const int32_t own = kept.ends[base];
    kept.ends[base] = begin;
    begin += own;
  }
  each_kept(kept, count, words, [&](int64_t token, int64_t base) {
    const int32_t place = kept.ends[base]++;
    kept.tokens[place] = static_cast<int32_t>(token);
    kept.weights[place] =
        weights[base / kPanel * spacing + token * kPanel + base % kPanel] * inverse[token];
  });
}

template <int Vectors>
static void add_kept_to(int64_t vectors, const Kept& kept, int32_t begin, int32_t end,
                        const float* tokens, int64_t stride, float* row) {
  if constexpr (Vectors > 0) {
    if (vectors < Vectors) {
      add_kept_to<Vectors - 1>(vectors, kept, begin, end, tokens, stride, row);
      return;
    }
    Vec sums[Vectors] = {};
    for (int32_t place = begin; place < end; ++place) {
      const float* token = tokens + kept.tokens[place] * stride;
      const Vec weight = broadcast(kept.weights[place]);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) sums[i] += weight * load(token + i * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i)
      store(row + i * kLanes, load(row + i * kLanes) + sums[i]);
  }
}

// rows [bases, row_stride] += each base's tokens by their weights; what stands in a row behind
// its columns means nothing.
static void add_kept(const EmSizes& sizes, const Kept& kept, const float* tokens, float* rows) {
  constexpr int64_t kVectors = 8;
  const int64_t stride = row_stride(sizes), vectors = stride / kLanes;
  const int64_t blocks = (vectors + kVectors - 1) / kVectors;
  int32_t begin = 0;
  for (int64_t base = 0; base < sizes.bases; ++base) {
    const int32_t end = kept.ends[base];
    for (int64_t block = 0; block < blocks && begin < end; ++block) {
      const int64_t first = vectors * block / blocks;
      add_kept_to<kVectors>(vectors * (block + 1) / blocks - first, kept, begin, end,
                            tokens + first * kLanes, tile_stride(sizes),
                            rows + base * stride + first * kLanes);
    }
    begin = end;
  }
}

// sums [panels, columns, kPanel] += rows [bases, row_stride].
static void add_rows(const EmSizes& sizes, const float* rows, float* sums) {
  const int64_t stride = row_stride(sizes), columns = sizes.columns();
  for (int64_t base = 0; base < sizes.bases; ++base) {
    float* column = sums + base / kPanel * columns * kPanel + base % kPanel;
    for (int64_t i = 0; i < columns; ++i) column[i * kPanel] += rows[base * stride + i];
  }
}

static void clear(int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
}

static void add_sums(const float* from, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += kLanes) store(sums + i, load(sums + i) + load(from + i));
}

static void em_pass(const EmSizes& sizes, const Rows& features, const Rows& payload, int64_t first,
                    int64_t last, const float* directions, float* sums, float* scratch) {
  const int64_t panels = num_panels(sizes.bases), width = sizes.width, columns = sizes.columns();
  const int64_t stride = tile_stride(sizes), spacing = kTile * kPanel;
  const int64_t all_sums = panels * columns * kPanel, all_rows = sizes.bases * row_stride(sizes);
  const int64_t tiles = (last - first + kTile - 1) / kTile;
  const int64_t chunks = (width + kChunk - 1) / kChunk;
  Kept kept;
  kept.lanes = reinterpret_cast<uint64_t*>(scratch);
  float* weights = scratch + 2 * kTile * lane_words(sizes.bases);  // [panels, kTile, kPanel]
  float* tokens = weights + panels * spacing;    // [kTile, stride]: features, 1, payload
  float* packed = tokens + kTile * stride;       // [blocks of columns, kTile, rows of the block]
  float* inverse = packed + kTile * columns;     // [kTile]
  float* some = inverse + kTile;                 // [panels, columns, kPanel]: of kTilesPerSum tiles
  float* rows = some + all_sums;                 // [bases, row_stride]: theirs of few weights
  kept.ends = reinterpret_cast<int32_t*>(rows + all_rows);
  kept.tokens = kept.ends + sizes.bases;
  kept.weights = reinterpret_cast<float*>(kept.tokens + most_kept(sizes, kTile));
  for (int64_t start = 0; start < tiles; start += kTilesPerSum) {
    float* target = start == 0 ? sums : some;
    bool many = false, few = false;
    for (int64_t tile = start; tile < smaller(start + kTilesPerSum, tiles); ++tile) {
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
      weigh(count, sizes.bases, weights, inverse, kept);
      if (kept.total <= most_kept(sizes, count)) {
        if (!few) clear(all_rows, rows);
        few = true;
        sort_kept(count, sizes.bases, weights, inverse, kept);
        add_kept(sizes, kept, tokens, rows);
        continue;
      }
      pack(columns, count, tokens, stride, inverse, packed);
      for (int64_t panel = 0; panel < panels; ++panel)
        multiply_packed(columns, count, packed, weights + panel * spacing,
                        target + panel * columns * kPanel, many);
      many = true;
    }
    if (start == 0 && !many) clear(all_sums, sums);
    if (start > 0 && many) add_sums(some, all_sums, sums);
    if (few) add_rows(sizes, rows, sums);
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
