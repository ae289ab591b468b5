// partial_attention on the CPU: checks, threads, the merge of parts.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace stem::cpu {
namespace {

// A head's keys are cut into parts for threads. How many depends on the shapes alone, so that equal
// calls give equal bits on any number of threads: a power of two, up to 64 for all heads, of at
// least 1,024 keys. Beyond 65,536 keys there are more parts: one long float32 sum rounds too often.
constexpr int64_t kTasks = 64, kKeysPerPart = 1024, kMostKeysPerPart = 65536;

// States [parts, rows, panel] of one panel of queries, `stride` apart -> the queries' rows of
// outputs [count, value_width] and their logsumexp, taken one part after the other.
void merge(const PartialSizes& sizes, int64_t panel, const float* states, int64_t parts,
           int64_t stride, int64_t count, float* outputs, float* logsumexp) {
  std::vector<double> row(sizes.value_width);
  for (int64_t lane = 0; lane < count; ++lane) {
    float peak = states[lane];
    for (int64_t part = 1; part < parts; ++part)
      if (states[part * stride + lane] > peak) peak = states[part * stride + lane];
    const float shift = std::isinf(peak) && peak < 0.0f ? 0.0f : peak;
    row.assign(row.size(), 0.0);
    double mass = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
      const float* column = states + part * stride + lane;
      const float share = std::exp2(column[0] - shift);
      mass += column[panel] * share;
      for (int64_t i = 0; i < sizes.value_width; ++i) row[i] += column[(2 + i) * panel] * share;
    }
    for (int64_t i = 0; i < sizes.value_width; ++i)
      outputs[lane * sizes.value_width + i] = static_cast<float>(row[i] / mass);
    constexpr double kLn2 = 0.69314718055994531;
    logsumexp[lane] = static_cast<float>(peak * kLn2 + std::log(mass));
  }
}

std::tuple<Tensor, Tensor> partial_attention(const Tensor& query, const Tensor& key,
                                             const Tensor& value, double scale) {
  const DType dtype = dtype_of(query, "query");
  check(query, "query", {-1, -1, -1, -1});
  const int64_t batch = query.size(0), heads = query.size(1);
  check(key, "key", {batch, heads, -1, query.size(3)});
  const int64_t keys = key.size(2), leads = batch * heads;
  check(value, "value", {batch, heads, keys, -1});
  STD_TORCH_CHECK(dtype_of(key, "key") == dtype && dtype_of(value, "value") == dtype,
                  "query, key and value must have one dtype");
  STD_TORCH_CHECK(keys > 0, "there must be at least one key");
  const PartialSizes sizes{query.size(2), query.size(3), value.size(3)};
  const Kernels& kernel = kernels();
  const int64_t panels = (sizes.queries + kernel.panel - 1) / kernel.panel;
  const int64_t state = sizes.rows() * kernel.panel;
  int64_t parts = 1;
  while ((2 * parts * leads <= kTasks && 2 * parts * kKeysPerPart <= keys) ||
         parts * kMostKeysPerPart < keys)
    parts *= 2;
  const Tensor states = float_tensor(query, {leads, parts, panels, state});
  float* states_data = states.mutable_data_ptr<float>();
  const Tensor outputs = float_tensor(query, {batch, heads, sizes.queries, sizes.value_width});
  const Tensor logsumexp = float_tensor(query, {batch, heads, sizes.queries});
  if (sizes.queries == 0) return {outputs, logsumexp};
  parallel_for(0, leads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernel.partial_scratch(sizes));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, b = task / parts / heads, head = task / parts % heads;
      kernel.partial_attention(
          sizes, {rows_of(query, dtype, b, head), rows_of(key, dtype, b, head)},
          rows_of(value, dtype, b, head), static_cast<float>(scale), keys * part / parts,
          keys * (part + 1) / parts, states_data + task * panels * state, scratch.get());
    }
  });
  float* outputs_data = outputs.mutable_data_ptr<float>();
  float* logsumexp_data = logsumexp.mutable_data_ptr<float>();
  parallel_for(0, leads * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t lead = task / panels, panel = task % panels, first = panel * kernel.panel;
      const int64_t left = sizes.queries - first, query_row = lead * sizes.queries + first;
      merge(sizes, kernel.panel, states_data + (lead * parts * panels + panel) * state, parts,
            panels * state, left < kernel.panel ? left : kernel.panel,
            outputs_data + query_row * sizes.value_width, logsumexp_data + query_row);
    }
  });
  return {outputs, logsumexp};
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("partial_attention", TORCH_BOX(&stem::cpu::partial_attention));
}
