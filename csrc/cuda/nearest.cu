// nearest_token on GPUs: checks, memory for the result, registration.

#include "stem/nearest.cuh"
#include "tensors.h"

namespace stem {

extern template void nearest_token(const Context&, const NearestCall<float>&);
extern template void nearest_token(const Context&, const NearestCall<__half>&);
extern template void nearest_token(const Context&, const NearestCall<__nv_bfloat16>&);

namespace {

Tensor nearest_token_cuda(
    const Tensor& query, const Tensor& keys, const Tensor& inverse_norms) {
  STD_TORCH_CHECK(query.dim() == 4 && keys.dim() == 4,
                  "query and keys must be [B, h, rows, channels]; they have ", query.dim(), " and ",
                  keys.dim(), " dimensions");
  const int64_t batch = query.size(0), heads = query.size(1), n = query.size(2);
  const int64_t num_keys = keys.size(2), dim = query.size(3);
  const ScalarType dtype = query.scalar_type();
  check("query", query, query, dtype, {batch, heads, n, dim});
  check("keys", keys, query, dtype, {batch, heads, -1, dim});
  check("inverse_norms", inverse_norms, query, ScalarType::Float, {batch, heads, num_keys});
  STD_TORCH_CHECK(inverse_norms.is_contiguous(), "inverse_norms must be contiguous");
  STD_TORCH_CHECK(num_keys > 0 && dim > 0, "there must be a key, of at least one channel");
  const Tensor found = empty(query, {batch, heads, n}, ScalarType::Int);
  dispatch("query", query, [&](auto type) {
    using T = decltype(type);
    const Device device(query);
    nearest_token(
        device.context,
        NearestCall<T>{
            view_of<T>("query", query), view_of<T>("keys", keys), floats(inverse_norms),
            static_cast<int32_t*>(found.data_ptr()), batch * heads, n,
            static_cast<int>(num_keys)});
  });
  return found;
}

}  // namespace
}  // namespace stem

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CUDA, library) {
  library.impl("nearest_token", TORCH_BOX(&stem::nearest_token_cuda));
}
