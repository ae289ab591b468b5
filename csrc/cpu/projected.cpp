// projected_attention on the CPU: checks, threads, what all of them read.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace stem::cpu {
namespace {

// Weights [rows, depth] as the products take them, whatever the threads.
class Packed {
 public:
  Packed(const Tensor& weight, DType dtype, int64_t rows, int64_t depth)
      : data_(rows * depth) {
    const Rows source{weight.const_data_ptr(), weight.stride(0), dtype};
    const int64_t blocks = kernels().weight_blocks(rows);
    parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      const Scratch scratch(kernels().panel * depth);
      for (int64_t block = begin; block < end; ++block)
        kernels().pack_weight(source, rows, depth, block, data_.get(), scratch.get());
    });
  }
  const float* data() const { return data_.get(); }

 private:
  Scratch data_;
};

const float* floats_or_null(const std::optional<Tensor>& tensor, const char* name, int64_t size) {
  if (!tensor) return nullptr;
  check_floats(*tensor, name, {size});
  return tensor->const_data_ptr<float>();
}

Tensor projected_attention(const Tensor& tokens, const Tensor& query_weight,
                           const std::optional<Tensor>& query_bias, const Tensor& key,
                           const Tensor& value, const Tensor& output_weight,
                           const std::optional<Tensor>& output_bias,
                           const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& correction,
                           const std::optional<Tensor>& query_mean, double scale) {
  const DType dtype = dtype_of(tokens, "tokens");
  check(tokens, "tokens", {-1, -1, -1});
  const int64_t batch = tokens.size(0), num_tokens = tokens.size(1);
  check(key, "key", {batch, -1, -1, -1});
  check(value, "value", {batch, key.size(1), key.size(2), -1});
  const ProjectedSizes sizes{{key.size(2), key.size(3), value.size(3)},
                             key.size(1),
                             tokens.size(2),
                             output_weight.size(0)};
  const AttentionSizes& attention = sizes.attention;
  const int64_t heads = sizes.heads, inner = heads * attention.width;
  const int64_t attended = heads * attention.value_width;
  check(query_weight, "query_weight", {inner, sizes.channels});
  check(output_weight, "output_weight", {sizes.outputs, attended});
  for (const Tensor* each : {&key, &value, &query_weight, &output_weight})
    STD_TORCH_CHECK(dtype_of(*each, "key, value or a weight") == dtype,
                    "tokens, weights, key and value must have one dtype");
  STD_TORCH_CHECK(attention.bases > 0, "there must be at least one base");
  if (bias) check_floats(*bias, "bias", {batch, heads, attention.bases});
  STD_TORCH_CHECK(correction.has_value() == query_mean.has_value(),
                  "correction and query_mean go together");
  if (correction) {
    check_floats(*correction, "correction",
                 {batch, heads, attention.width + 1, attention.value_width});
    check_floats(*query_mean, "query_mean", {batch, heads, attention.width});
  }
  const Tensor out = empty(tokens, {batch, num_tokens, sizes.outputs}, tokens.scalar_type());
  const int64_t bytes = dtype == DType::kFloat ? 4 : 2;
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  advise_huge_pages(out_data, batch * num_tokens * sizes.outputs * bytes);
  const Packed packed_query(query_weight, dtype, inner, sizes.channels);
  const Packed packed_output(output_weight, dtype, sizes.outputs, attended);
  const int64_t of_head = attention.bases * (attention.width + attention.value_width + 1);
  const Scratch packed(batch * heads * of_head);
  std::vector<PackedBases> bases(batch * heads);
  std::vector<Correction> corrections(batch * heads);
  parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch rows(attention.bases * (attention.width + attention.value_width));
    for (int64_t lead = begin; lead < end; ++lead) {
      const int64_t b = lead / heads, head = lead % heads;
      float* to_key = packed.get() + lead * of_head;
      float* to_value = to_key + attention.bases * attention.width;
      float* shifts = to_value + attention.bases * attention.value_width;
      const float* shift = nullptr;
      if (bias)
        shift = bias->const_data_ptr<float>() + b * bias->stride(0) + head * bias->stride(1);
      kernels().pack_bases(attention, rows_of(key, dtype, b, head), rows_of(value, dtype, b, head),
                           shift, bias ? bias->stride(2) : 0, static_cast<float>(scale), to_key,
                           to_value, shifts, rows.get());
      bases[lead] = {to_key, to_value, bias ? shifts : nullptr};
      if (correction)
        corrections[lead] = correction_of(*correction, *query_mean, b, head);
    }
  });
  const float* first_bias = floats_or_null(query_bias, "query_bias", inner);
  const float* last_bias = floats_or_null(output_bias, "output_bias", sizes.outputs);
  // As many tokens a task as leave work for every thread; results do not depend on it.
  const int64_t panel = kernels().panel;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t share = (batch * num_tokens / threads + panel - 1) / panel * panel;
  const int64_t at_once =
      std::clamp(share, panel, kernels().projected_tokens(sizes));
  const int64_t parts = (num_tokens + at_once - 1) / at_once;
  parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().projected_scratch(sizes));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, part = task % parts;
      const ProjectedOperands given{packed_query.data(),      first_bias,
                                    packed_output.data(),     last_bias,
                                    bases.data() + b * heads, corrections.data() + b * heads};
      const int64_t last = (part + 1) * at_once;
      const Rows rows{static_cast<const char*>(tokens.const_data_ptr()) +
                          b * tokens.stride(0) * bytes,
                      tokens.stride(1), dtype};
      kernels().projected_attention(sizes, given, rows, part * at_once,
                                    last < num_tokens ? last : num_tokens,
                                    out_data + b * num_tokens * sizes.outputs * bytes,
                                    scratch.get());
    }
  });
  return out;
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("projected_attention", TORCH_BOX(&stem::cpu::projected_attention));
}
