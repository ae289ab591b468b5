// em_statistics and soft_em on GPUs: checks, memory for results, registration.

#include <optional>
#include <tuple>

#include "stem/em.cuh"
#include "tensors.h"

namespace stem {

#define STEM_ELSEWHERE(T)                                                                  \
  extern template void em_statistics(                                                      \
      const Context&, const EmCall<T>&, float*, float*, float*);                           \
  extern template void soft_em(                                                            \
      const Context&, const EmCall<T>&, int64_t, bool, float, float*, float*, float*);
STEM_ELSEWHERE(float)
STEM_ELSEWHERE(__half)
STEM_ELSEWHERE(__nv_bfloat16)
#undef STEM_ELSEWHERE

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

// `run` with the context, the call and pointers to the three results.
template <typename Run>
Result em_operator(
    const Tensor& features, const Tensor& bases, const std::optional<Tensor>& payload,
    double temperature, bool normalize, Run run) {
  STD_TORCH_CHECK(features.dim() == 4, "features must be [B, h, n, D]; they have ", features.dim(),
                  " dimensions");
  const int64_t batch = features.size(0), heads = features.size(1), n = features.size(2);
  const int64_t dim = features.size(3), num_bases = bases.dim() == 4 ? bases.size(2) : -1;
  const int64_t width = payload && payload->dim() == 4 ? payload->size(3) : 0;
  check("features", features, features, features.scalar_type(), {batch, heads, n, dim});
  check("bases", bases, features, ScalarType::Float, {batch, heads, -1, dim});
  STD_TORCH_CHECK(bases.is_contiguous(), "bases must be contiguous: call .contiguous() on them");
  STD_TORCH_CHECK(dim > 0 && num_bases > 0 && num_bases <= LARGEST_BASES, "there are ", num_bases,
                  " bases of ", dim, " channels; the kernels take 1 to ", LARGEST_BASES,
                  " bases of at least 1: use another backend");
  if (payload) check("payload", *payload, features, features.scalar_type(), {batch, heads, n, -1});
  const Tensor new_bases = empty(features, {batch, heads, num_bases, dim}, ScalarType::Float);
  const Tensor mass = empty(features, {batch, heads, num_bases}, ScalarType::Float);
  const Tensor sums = empty(features, {batch, heads, num_bases, width}, ScalarType::Float);
  dispatch("features", features, [&](auto type) {
    using T = decltype(type);
    const Device device(features);
    const EmCall<T> call{view_of<T>("features", features),
                         payload ? view_of<T>("payload", *payload) : View<T>{},
                         floats(bases),
                         batch * heads,
                         n,
                         static_cast<int>(num_bases),
                         static_cast<float>(temperature),
                         normalize};
    run(device.context, call, floats(new_bases), floats(mass), floats(sums));
  });
  return {new_bases, mass, sums};
}

Result em_statistics_cuda(
    const Tensor& features, const Tensor& bases, const std::optional<Tensor>& payload,
    double temperature, bool normalize) {
  return em_operator(
      features, bases, payload, temperature, normalize,
      [](const Context& context, const auto& call, float* p_sums, float* p_mass, float* p_payload) {
        em_statistics(context, call, p_sums, p_mass, p_payload);
      });
}

// bases, payload bases, mass
Result soft_em_cuda(
    const Tensor& features, const Tensor& bases, const std::optional<Tensor>& payload,
    int64_t num_iters, double temperature, bool normalize, bool keep_empty, double least_mass) {
  STD_TORCH_CHECK(num_iters >= 1, "num_iters is ", num_iters, "; it must be at least 1");
  auto [new_bases, mass, payload_bases] = em_operator(
      features, bases, payload, temperature, normalize,
      [&](const Context& context, const auto& call, float* p_bases, float* p_mass,
          float* p_payload) {
        soft_em(context, call, num_iters, keep_empty, static_cast<float>(least_mass), p_bases,
                p_mass, p_payload);
      });
  return {new_bases, payload_bases, mass};
}

}  // namespace
}  // namespace stem

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CUDA, library) {
  library.impl("em_statistics", TORCH_BOX(&stem::em_statistics_cuda));
  library.impl("soft_em", TORCH_BOX(&stem::soft_em_cuda));
}
