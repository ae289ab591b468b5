// basis_attention on the CPU: checks, threads, launch.
#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace stem::cpu {
namespace {

// Of one head, by one thread; enough that packing the bases is nothing beside it.
constexpr int64_t kQueriesPerTask = 1024;

Tensor basis_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& bias, double scale) {
  const DType dtype = dtype_of(query, "query");
  check(query, "query", {-1, -1, -1, -1});
  const int64_t batch = query.size(0), heads = query.size(1), num_queries = query.size(2);
  check(key, "key", {batch, heads, -1, query.size(3)});
  const AttentionSizes sizes{key.size(2), query.size(3), value.size(3)};
  check(value, "value", {batch, heads, sizes.bases, -1});
  STD_TORCH_CHECK(dtype_of(key, "key") == dtype && dtype_of(value, "value") == dtype,
                  "query, key and value must have one dtype");
  STD_TORCH_CHECK(sizes.bases > 0, "there must be at least one base");
  if (bias) {
    STD_TORCH_CHECK(dtype_of(*bias, "bias") == DType::kFloat, "bias must be float32");
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 3 && bias->size(0) == batch &&
                        bias->size(1) == heads && bias->size(2) == sizes.bases,
                    "bias must be [B, h, K], expanded, on the CPU");
  }
  const int64_t shape[] = {batch, num_queries, heads, sizes.value_width};
  const Tensor out = torch::stable::new_empty(query, {shape, 4});
  const int64_t bytes = dtype == DType::kFloat ? 4 : 2, out_stride = heads * sizes.value_width;
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  const Kernels& kernel = kernels();
  const int64_t parts = (num_queries + kQueriesPerTask - 1) / kQueriesPerTask;
  torch::stable::parallel_for(0, batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernel.attention_scratch(sizes));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, head = task / parts % heads, b = task / parts / heads;
      const float* shift = nullptr;
      if (bias)
        shift = bias->const_data_ptr<float>() + b * bias->stride(0) + head * bias->stride(1);
      kernel.attention(sizes, rows_of(query, dtype, b, head), rows_of(key, dtype, b, head),
                       rows_of(value, dtype, b, head), shift, bias ? bias->stride(2) : 0,
                       static_cast<float>(scale), num_queries * part / parts,
                       num_queries * (part + 1) / parts,
                       out_data + (b * num_queries * out_stride + head * sizes.value_width) * bytes,
                       out_stride, scratch.get());
    }
  });
  return out;
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("basis_attention", TORCH_BOX(&stem::cpu::basis_attention));
}
