// What csrc/cpu asks of the kernels, and the table that each instruction set fills.
#pragma once

#include <cstdint>

namespace stem::cpu {

enum class DType { kFloat, kHalf, kBFloat16 };

// Rows of contiguous elements: row i starts `stride` elements after row i - 1.
struct Rows {
  const void* data;
  int64_t stride;
  DType dtype;
};

// One head of EM. Per-base arrays are in panels of `Kernels::panel` bases: [panels, rows, panel],
// the last one padded. Sums have width + 1 + payload_width rows: sums, mass, payload sums.
struct EmSizes {
  int64_t bases;
  int64_t width;
  int64_t payload_width;
  int64_t columns() const { return width + 1 + payload_width; }
};

struct AttentionSizes {
  int64_t bases;
  int64_t width;
  int64_t value_width;
};

// Queries of one head and the keys that weigh its bases.
struct AttentionMap {
  Rows query, key;
};

// What is added to the attention of calibrated bases: (query - mean) matrix + the matrix's last row.
struct Correction {
  const float* matrix;  // [width + 1, value_width], rows `stride` apart; or null
  int64_t stride;
  const float* mean;  // [width]
};

// A head's bases as products take them: keys by blocks of bases, times the logits' factor in base 2,
// and values by blocks of channels.
struct PackedBases {
  const float* key;     // [blocks, width, bases of the block]
  const float* value;   // [blocks, bases, channels of the block]
  const float* shifts;  // [bases]: the bias in base 2; or null
};

// Tokens that are projected to the queries of all heads, and what these attend to, projected again.
struct ProjectedSizes {
  AttentionSizes attention;
  int64_t heads;
  int64_t channels;
  int64_t outputs;
};

struct ProjectedOperands {
  const float* query_weight;   // [blocks, channels, rows of the block], of heads * width rows
  const float* query_bias;     // [heads * width]; or null
  const float* output_weight;  // [blocks, heads * value_width, rows of the block], of outputs rows
  const float* output_bias;    // [outputs]; or null
  const PackedBases* bases;    // [heads]
  const Correction* corrections;  // [heads]
};

// A few queries of one head, in panels. A panel's state is [2 + value_width, panel]: each query's
// largest logit in base 2, sum of weights, sums of weighted values.
struct PartialSizes {
  int64_t queries;
  int64_t width;
  int64_t value_width;
  int64_t rows() const { return 2 + value_width; }
};

// A video of frames x rows x columns tokens, and what one head of it attends to.
struct WindowSizes {
  int64_t frames, rows, columns;
  int64_t window;  // places to each side
  int64_t width, value_width;
  int64_t bases, texts;
  int64_t places() const { return rows * columns; }
  // A value, what it weighs in the softmax's sum, and what of that is a base's.
  int64_t value_columns() const { return value_width + 2; }
};

struct WindowOperands {
  const float* keys;         // [places, frames, width]
  const float* values;       // [places, frames, value_columns]
  const int32_t* numbers;    // [places, frames]: each token's base
  const float* base_keys;    // [bases, width]
  const float* base_sums;    // [bases, value_columns]: sums over a base's tokens
  const float* base_bias;    // [bases]: 0, or -inf where a base has no tokens
  const float* text_keys;    // [texts, width]
  const float* text_values;  // [texts, value_columns]
  const float* text_bias;    // [texts], in base 2; or null
  const float* matrix;       // [width, value_width], for queries times scale; or null
};

struct Kernels {
  const char* name;
  int64_t panel;
  int64_t tile;  // tokens of EM that are worked on at a time

  // Floats of scratch memory that em_pass needs.
  int64_t (*em_scratch)(const EmSizes&);
  // Adds up tokens first ... last - 1, at least one, into sums [panels, columns, panel], which is
  // written and not read. directions [panels, width, panel] carry log2(e) / temperature.
  void (*em_pass)(const EmSizes&, const Rows& features, const Rows& payload, int64_t first,
                  int64_t last, const float* directions, float* sums, float* scratch);
  // Column range of a panel [rows, panel] <- and -> base-major [bases, width].
  void (*load_panel)(const float* bases, int64_t num_bases, int64_t width, int64_t panel_index,
                     float* panel);
  void (*store_panel)(const float* panel, int64_t num_bases, int64_t width, int64_t panel_index,
                      float* bases);
  // One panel of bases [width, panel] -> what the logits are made with.
  void (*directions)(const float* bases, int64_t width, bool normalize, double scale,
                     float* directions);
  // Adds parts 1 ... parts - 1, `stride` floats apart, to the first, in order.
  void (*add_parts)(float* first, int64_t parts, int64_t stride, int64_t count);
  // New bases of one panel from its sums; payload sums and mass become payload bases and mass.
  void (*update)(const EmSizes&, bool keep_empty, float least_mass, float* sums, float* bases);

  // Floats of scratch memory that attention by one map needs, or by two.
  int64_t (*attention_scratch)(const AttentionSizes&, int maps);
  // Queries first ... last - 1 -> rows of out, `out_stride` elements apart, of the query's dtype.
  // bias [bases] float, bias_stride apart, or null.
  void (*attention)(const AttentionSizes&, const AttentionMap&, const Rows& value,
                    const float* bias, int64_t bias_stride, const Correction&, float scale,
                    int64_t first, int64_t last, void* out, int64_t out_stride, float* scratch);
  // The same by a target's and a source's map; mask [queries]: share of the target.
  void (*blended_attention)(const AttentionSizes&, const AttentionMap (&maps)[2],
                            const Rows& value, const float* mask, const float* bias,
                            int64_t bias_stride, float scale, int64_t first, int64_t last,
                            void* out, int64_t out_stride, float* scratch);

  // Blocks of `rows` rows of weights [rows, depth], and one of them packed; scratch [panel, depth].
  int64_t (*weight_blocks)(int64_t rows);
  void (*pack_weight)(const Rows& weight, int64_t rows, int64_t depth, int64_t block,
                      float* packed, float* scratch);
  // One head's bases packed; rows [bases, the wider of both widths] is scratch, shifts [bases] is
  // written with a bias or not.
  void (*pack_bases)(const AttentionSizes&, const Rows& key, const Rows& value, const float* bias,
                     int64_t bias_stride, float scale, float* packed_key, float* packed_value,
                     float* shifts, float* rows);
  // Tokens that projected_attention takes at once, and floats of scratch memory that it needs.
  int64_t (*projected_tokens)(const ProjectedSizes&);
  int64_t (*projected_scratch)(const ProjectedSizes&);
  // Tokens first ... last - 1 -> rows of out, `outputs` elements apart, of the tokens' dtype.
  void (*projected_attention)(const ProjectedSizes&, const ProjectedOperands&, const Rows& tokens,
                              int64_t first, int64_t last, void* out, float* scratch);

  // Floats of scratch memory that partial_attention needs.
  int64_t (*partial_scratch)(const PartialSizes&);
  // All queries, and keys first ... last - 1, at least one -> states [panels, rows, panel], which
  // are written and not read.
  void (*partial_attention)(const PartialSizes&, const AttentionMap&, const Rows& value,
                            float scale, int64_t first, int64_t last, float* states,
                            float* scratch);

  // Keys, values and numbers of places first ... last - 1 as WindowOperands has them; numbers are
  // assignment's [frames, places], and neither is needed without bases.
  void (*place_tokens)(const WindowSizes&, const Rows& key, const Rows& value,
                       const int32_t* assignment, int64_t first, int64_t last, float* keys,
                       float* values, int32_t* numbers);
  // Floats of scratch memory that window_attention needs.
  int64_t (*window_scratch)(const WindowSizes&);
  // Queries of places first ... last - 1 -> rows of out, `out_stride` elements of dtype `to` apart.
  // peaks and masses [frames, places], or null: largest logit in base 2, and sum of weights.
  void (*window_attention)(const WindowSizes&, const WindowOperands&, const Rows& query,
                           float scale, int64_t first, int64_t last, DType to, void* out,
                           int64_t out_stride, float* peaks, float* masses, float* scratch);

  // One panel of keys, each times its factor -> packed [width, panel]; scratch [width].
  void (*pack_keys)(const Rows& keys, const float* factors, int64_t num_keys, int64_t width,
                    int64_t panel_index, float* packed, float* scratch);
  // Floats of scratch memory that nearest needs.
  int64_t (*nearest_scratch)(int64_t width);
  // Queries first ... last - 1 -> out[first ... last - 1]; packed [panels, width, panel].
  void (*nearest)(const Rows& query, int64_t num_keys, int64_t width, int64_t first, int64_t last,
                  const float* packed, int32_t* out, float* scratch);
};

// Those that this CPU can run, the fastest; ATEN_CPU_CAPABILITY=default or avx2 asks for less.
const Kernels& kernels();

}  // namespace stem::cpu
