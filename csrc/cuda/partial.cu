// partial_attention on GPUs: checks, memory for the result, registration.

#include <tuple>

#include "stem/partial.cuh"
#include "tensors.h"

namespace stem {

extern template void partial_attention(const Context&, const PartialCall<float>&);
extern template void partial_attention(const Context&, const PartialCall<__half>&);
extern template void partial_attention(const Context&, const PartialCall<__nv_bfloat16>&);

namespace {

std::tuple<Tensor, Tensor> partial_attention_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key and value must be [B, h, rows, channels]; they have ", query.dim(),
                  ", ", key.dim(), " and ", value.dim(), " dimensions");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  const int64_t dim = query.size(3), n = key.size(2), width = value.size(3);
  const ScalarType dtype = query.scalar_type();
  check("query", query, query, dtype, {batch, heads, queries, dim});
  check("key", key, query, dtype, {batch, heads, -1, dim});
  check("value", value, query, dtype, {batch, heads, n, -1});
  STD_TORCH_CHECK(dim <= PARTIAL_WIDTH && width <= PARTIAL_WIDTH, "query and value have ", dim,
                  " and ", width, " channels; the kernels take up to ", PARTIAL_WIDTH,
                  ": use another backend");
  STD_TORCH_CHECK(n > 0, "there are no keys; there must be at least one");
  const Tensor out = empty(query, {batch, heads, queries, width}, ScalarType::Float);
  const Tensor logsumexp = empty(query, {batch, heads, queries}, ScalarType::Float);
  dispatch("query", query, [&](auto type) {
    using T = decltype(type);
    const Device device(query);
    partial_attention(
        device.context,
        PartialCall<T>{
            view_of<T>("query", query), view_of<T>("key", key), view_of<T>("value", value),
            floats(out), floats(logsumexp), batch * heads, n, static_cast<int>(queries),
            static_cast<float>(scale)});
  });
  return {out, logsumexp};
}

}  // namespace
}  // namespace stem

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CUDA, library) {
  library.impl("partial_attention", TORCH_BOX(&stem::partial_attention_cuda));
}
