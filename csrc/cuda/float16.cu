// The kernels for float16.

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "stem/em.cuh"
#include "stem/nearest.cuh"
#include "stem/partial.cuh"

namespace stem {

template void em_statistics(
    const Context&, const EmCall<__half>&, float*, float*, float*);
template void soft_em(
    const Context&, const EmCall<__half>&, int64_t, bool, float, float*, float*, float*);
template void basis_attention(const Context&, const AttentionCall<__half>&);
template void blended_attention(
    const Context&, AttentionCall<__half>, const View<__half>&, const View<__half>&, const float*,
    int64_t);
template void add_correction(const Context&, const CorrectionCall<__half>&);
template void nearest_token(const Context&, const NearestCall<__half>&);
template void partial_attention(const Context&, const PartialCall<__half>&);

}  // namespace stem
