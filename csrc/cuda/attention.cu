// basis_attention and blended_attention on GPUs: checks, memory for the result, registration.

#include <optional>

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "tensors.h"

namespace stem {

#define STEM_ELSEWHERE(T)                                                                 \
  extern template void add_correction(const Context&, const CorrectionCall<T>&);          \
  extern template void basis_attention(const Context&, const AttentionCall<T>&);          \
  extern template void blended_attention(                                                 \
      const Context&, AttentionCall<T>, const View<T>&, const View<T>&, const float*, int64_t);
STEM_ELSEWHERE(float)
STEM_ELSEWHERE(__half)
STEM_ELSEWHERE(__nv_bfloat16)
#undef STEM_ELSEWHERE

namespace {

// `run` with the context and the call of a map; what it returns in p_out.
template <typename Run>
Tensor attention_operator(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    double scale, Run run) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must be [B, h, rows, channels]; they have ", query.dim(),
                  ", ", key.dim(), " and ", value.dim(), " dimensions");
  const int64_t batch = query.size(0), heads = query.size(1), n = query.size(2);
  const int64_t dim = query.size(3), num_bases = key.size(2), width = value.size(3);
  const ScalarType dtype = query.scalar_type();
  check("query", query, query, dtype, {batch, heads, n, dim});
  check("key", key, query, dtype, {batch, heads, -1, dim});
  check("value", value, query, dtype, {batch, heads, num_bases, -1});
  if (bias) check("bias", *bias, query, ScalarType::Float, {batch, heads, num_bases});
  STD_TORCH_CHECK(dim <= ATTENTION_WIDTH && width <= ATTENTION_WIDTH, "query and value have ", dim,
                  " and ", width, " channels; the kernels take up to ", ATTENTION_WIDTH,
                  ": use another backend");
  STD_TORCH_CHECK(num_bases > 0, "there are no bases; there must be at least one");
  const Tensor out = empty(query, {batch, n, heads, width}, dtype);
  dispatch("query", query, [&](auto type) {
    using T = decltype(type);
    const Device device(query);
    run(device.context,
        AttentionCall<T>{
            view_of<T>("query", query),
            view_of<T>("key", key),
            view_of<T>("value", value),
            bias ? view(floats(*bias), bias->stride(0), bias->stride(1), bias->stride(2),
                        static_cast<int>(heads), 1)
                 : View<float>{},
            static_cast<T*>(out.data_ptr()),
            batch * heads,
            n,
            static_cast<int>(num_bases),
            static_cast<float>(scale),
            {},
            false});
  });
  return out;
}

Tensor basis_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& correction, const std::optional<Tensor>& query_mean,
    double scale) {
  STD_TORCH_CHECK(correction.has_value() == query_mean.has_value(),
                  "correction and query_mean go together");
  if (correction) {
    STD_TORCH_CHECK(query.dim() == 4 && value.dim() == 4 && query_mean->dim() == 3,
                    "query and value must be [B, h, rows, channels], query_mean [B, h, channels]");
    const auto sizes = query.sizes();
    check("correction", *correction, query, ScalarType::Float,
          {sizes[0], sizes[1], sizes[3] + 1, value.size(3)});
    check("query_mean", *query_mean, query, ScalarType::Float, {sizes[0], sizes[1], sizes[3]});
    STD_TORCH_CHECK(sizes[3] <= 1 || query_mean->stride(2) == 1,
                    "query_mean has a stride of ", query_mean->stride(2),
                    " between its numbers; call .contiguous() on it");
  }
  return attention_operator(
      query, key, value, bias, scale, [&](const Context& context, const auto& call) {
        basis_attention(context, call);
        if (!correction) return;
        using T = std::remove_pointer_t<decltype(call.p_out)>;
        const int heads = call.query.heads;
        add_correction(
            context,
            CorrectionCall<T>{
                call.query, view_of<float>("correction", *correction),
                view(floats(*query_mean), query_mean->stride(0), query_mean->stride(1), 0, heads,
                     call.query.width),
                call.p_out, call.leads, call.n});
      });
}

Tensor blended_attention_cuda(
    const Tensor& query_target, const Tensor& key_target, const Tensor& query_source,
    const Tensor& key_source, const Tensor& value, const Tensor& mask,
    const std::optional<Tensor>& bias, double scale) {
  const ScalarType dtype = query_target.scalar_type();
  STD_TORCH_CHECK(query_target.dim() == 4 && key_target.dim() == 4,
                  "queries and keys must be [B, h, rows, channels]");
  const auto sizes = query_target.sizes(), key_sizes = key_target.sizes();
  check("query_source", query_source, query_target, dtype,
        {sizes[0], sizes[1], sizes[2], sizes[3]});
  check("key_source", key_source, query_target, dtype,
        {key_sizes[0], key_sizes[1], key_sizes[2], key_sizes[3]});
  check("mask", mask, query_target, ScalarType::Float, {sizes[0], sizes[2]});
  STD_TORCH_CHECK(sizes[2] <= 1 || mask.stride(1) == 1, "mask has a stride of ", mask.stride(1),
                  " between its tokens; call .contiguous() on it");
  return attention_operator(
      query_target, key_target, value, bias, scale,
      [&](const Context& context, const auto& call) {
        using T = std::remove_pointer_t<decltype(call.p_out)>;
        blended_attention(context, call, view_of<T>("query_source", query_source),
                          view_of<T>("key_source", key_source), floats(mask), mask.stride(0));
      });
}

}  // namespace
}  // namespace stem

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CUDA, library) {
  library.impl("basis_attention", TORCH_BOX(&stem::basis_attention_cuda));
  library.impl("blended_attention", TORCH_BOX(&stem::blended_attention_cuda));
}
