// basis_attention on GPUs: checks, memory for the result, registration.

#include <optional>

#include "stem/attention.cuh"
#include "tensors.h"

namespace stem {

extern template void basis_attention(const Context&, const AttentionCall<float>&);
extern template void basis_attention(const Context&, const AttentionCall<__half>&);
extern template void basis_attention(const Context&, const AttentionCall<__nv_bfloat16>&);

namespace {

Tensor basis_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    double scale) {
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
    const AttentionCall<T> call{
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
        static_cast<float>(scale)};
    basis_attention(device.context, call);
  });
  return out;
}

}  // namespace
}  // namespace stem

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CUDA, library) {
  library.impl("basis_attention", TORCH_BOX(&stem::basis_attention_cuda));
}
