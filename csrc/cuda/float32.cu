// The kernels for float32.

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "stem/em.cuh"
#include "stem/nearest.cuh"
#include "stem/partial.cuh"

namespace stem {

template void em_statistics(
    const Context&, const EmCall<float>&, float*, float*, float*);
template void soft_em(
    const Context&, const EmCall<float>&, int64_t, bool, float, float*, float*, float*);
template void basis_attention(const Context&, const AttentionCall<float>&);
template void blended_attention(
    const Context&, AttentionCall<float>, const View<float>&, const View<float>&, const float*,
    int64_t);
template void add_correction(const Context&, const CorrectionCall<float>&);
template void nearest_token(const Context&, const NearestCall<float>&);
template void partial_attention(const Context&, const PartialCall<float>&);

}  // namespace stem
