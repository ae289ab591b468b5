// basis_attention and blended_attention on the CPU: checks, threads, launch.
#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace stem::cpu {
namespace {

// Of one head, by one thread; enough that packing the bases is nothing beside it.
constexpr int64_t kQueriesPerTask = 1024;

// What both operators have in common, checked: the sizes, and where a head's numbers lie.
struct Call {
  DType dtype;
  int64_t batch, heads, num_queries;
  AttentionSizes sizes;
  Tensor value;
  std::optional<Tensor> bias;

  Call(const Tensor& query, const Tensor& key, const Tensor& value,
       const std::optional<Tensor>& bias)
      : dtype(dtype_of(query, "query")), value(value), bias(bias) {
    check(query, "query", {-1, -1, -1, -1});
    batch = query.size(0), heads = query.size(1), num_queries = query.size(2);
    check(key, "key", {batch, heads, -1, query.size(3)});
    sizes = {key.size(2), query.size(3), value.size(3)};
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
  }

  AttentionMap map(const Tensor& query, const Tensor& key, int64_t b, int64_t head) const {
    return {rows_of(query, dtype, b, head), rows_of(key, dtype, b, head)};
  }

  // Calls run(b, head, bias, bias's stride, first query, last, out, out's stride, scratch).
  template <typename Run>
  Tensor each_part(const Tensor& query, int maps, const Run& run) const {
    const Tensor out =
        empty(query, {batch, num_queries, heads, sizes.value_width}, query.scalar_type());
    const int64_t bytes = dtype == DType::kFloat ? 4 : 2, out_stride = heads * sizes.value_width;
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    advise_huge_pages(out_data, batch * num_queries * out_stride * bytes);
    const int64_t parts = (num_queries + kQueriesPerTask - 1) / kQueriesPerTask;
    parallel_for(0, batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(kernels().attention_scratch(sizes, maps));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, head = task / parts % heads, b = task / parts / heads;
        const float* shift = nullptr;
        if (bias)
          shift = bias->const_data_ptr<float>() + b * bias->stride(0) + head * bias->stride(1);
        run(b, head, shift, bias ? bias->stride(2) : 0, num_queries * part / parts,
            num_queries * (part + 1) / parts,
            out_data + (b * num_queries * out_stride + head * sizes.value_width) * bytes,
            out_stride, scratch.get());
      }
    });
    return out;
  }
};

Tensor basis_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& correction,
                       const std::optional<Tensor>& query_mean, double scale) {
  const Call call(query, key, value, bias);
  STD_TORCH_CHECK(correction.has_value() == query_mean.has_value(),
                  "correction and query_mean go together");
  if (correction) {
    check_floats(*correction, "correction",
                 {call.batch, call.heads, call.sizes.width + 1, call.sizes.value_width});
    check_floats(*query_mean, "query_mean", {call.batch, call.heads, call.sizes.width});
  }
  return call.each_part(query, 1, [&](int64_t b, int64_t head, const float* shift,
                                      int64_t shift_stride, int64_t first, int64_t last, void* out,
                                      int64_t out_stride, float* scratch) {
    Correction added{};
    if (correction) added = correction_of(*correction, *query_mean, b, head);
    kernels().attention(call.sizes, call.map(query, key, b, head),
                        rows_of(value, call.dtype, b, head), shift, shift_stride, added,
                        static_cast<float>(scale), first, last, out, out_stride, scratch);
  });
}

Tensor blended_attention(const Tensor& query_target, const Tensor& key_target,
                         const Tensor& query_source, const Tensor& key_source,
                         const Tensor& value, const Tensor& mask,
                         const std::optional<Tensor>& bias, double scale) {
  const Call call(query_target, key_target, value, bias);
  const int64_t width = call.sizes.width;
  check(query_source, "query_source", {call.batch, call.heads, call.num_queries, width});
  check(key_source, "key_source", {call.batch, call.heads, call.sizes.bases, width});
  check(mask, "mask", {call.batch, call.num_queries});
  STD_TORCH_CHECK(dtype_of(query_source, "query_source") == call.dtype &&
                      dtype_of(key_source, "key_source") == call.dtype,
                  "queries and keys must have one dtype");
  STD_TORCH_CHECK(dtype_of(mask, "mask") == DType::kFloat, "mask must be float32");
  return call.each_part(
      query_target, 2,
      [&](int64_t b, int64_t head, const float* shift, int64_t shift_stride, int64_t first,
          int64_t last, void* out, int64_t out_stride, float* scratch) {
        const AttentionMap maps[2] = {call.map(query_target, key_target, b, head),
                                      call.map(query_source, key_source, b, head)};
        kernels().blended_attention(call.sizes, maps, rows_of(value, call.dtype, b, head),
                                    mask.const_data_ptr<float>() + b * mask.stride(0), shift,
                                    shift_stride, static_cast<float>(scale), first, last, out,
                                    out_stride, scratch);
      });
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("basis_attention", TORCH_BOX(&stem::cpu::basis_attention));
  library.impl("blended_attention", TORCH_BOX(&stem::cpu::blended_attention));
}
