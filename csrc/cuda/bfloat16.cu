// The kernels for bfloat16.

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "stem/em.cuh"
#include "stem/nearest.cuh"
#include "stem/partial.cuh"

namespace stem {

template void em_statistics(
    const Context&, const EmCall<__nv_bfloat16>&, float*, float*, float*);
template void soft_em(
    const Context&, const EmCall<__nv_bfloat16>&, int64_t, bool, float, float*, float*, float*);
template void basis_attention(const Context&, const AttentionCall<__nv_bfloat16>&);
template void blended_attention(
    const Context&, AttentionCall<__nv_bfloat16>, const View<__nv_bfloat16>&, const View<__nv_bfloat16>&, const float*,
    int64_t);
template void add_correction(const Context&, const CorrectionCall<__nv_bfloat16>&);
template void nearest_token(const Context&, const NearestCall<__nv_bfloat16>&);
template void partial_attention(const Context&, const PartialCall<__nv_bfloat16>&);

}  // namespace stem
