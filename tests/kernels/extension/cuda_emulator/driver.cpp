// The operators as functions that Python's ctypes can call. Memory that they ask for is NaN.

#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "stem/em.cuh"
#include "stem/nearest.cuh"
#include "stem/partial.cuh"

namespace {

class Memory {
 public:
  ~Memory() {
    for (void* p : kept_) std::free(p);
  }
  void* allocate(int64_t bytes) {
    const size_t size = static_cast<size_t>(stem::round_up<int64_t>(bytes + 1, 256));
    void* p = std::aligned_alloc(256, size);
    std::memset(p, 0xff, size);
    kept_.push_back(p);
    total += bytes;
    return p;
  }
  int64_t total = 0;

 private:
  std::vector<void*> kept_;
};

// A tensor [B, h, n, width] as Python describes it.
struct Rows {
  const void* p;
  int64_t stride_b, stride_h, stride_n, width;

  template <typename T>
  stem::View<T> as(int heads) const {
    return stem::view(static_cast<const T*>(p), stride_b, stride_h, stride_n, heads,
                      static_cast<int>(width));
  }
};

struct Sizes {
  int64_t batch, heads, n, bases, dtype, shared_limit, multiprocessors, chunk_bytes, longest_sum;
};

template <typename Function>
int64_t run(const Sizes& sizes, Function function) {
  Memory memory;
  const stem::Context context{nullptr, static_cast<int>(sizes.shared_limit),
                              static_cast<int>(sizes.multiprocessors),
                              [&](int64_t bytes) { return memory.allocate(bytes); },
                              sizes.chunk_bytes, sizes.longest_sum};
  try {
    if (sizes.dtype == 0) function(context, float());
    if (sizes.dtype == 1) function(context, __half());
    if (sizes.dtype == 2) function(context, __nv_bfloat16());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
  return memory.total;
}

template <typename T>
stem::EmCall<T> em_call(
    const Sizes& sizes, const Rows& features, const Rows& payload, const float* p_bases,
    float temperature, bool normalize) {
  const int heads = static_cast<int>(sizes.heads);
  return {features.as<T>(heads),
          payload.as<T>(heads),
          p_bases,
          sizes.batch * sizes.heads,
          sizes.n,
          static_cast<int>(sizes.bases),
          temperature,
          normalize};
}

template <typename T>
stem::AttentionCall<T> attention_call(
    const Sizes& sizes, const Rows& query, const Rows& key, const Rows& value, const Rows& bias,
    float scale, void* p_out) {
  const int heads = static_cast<int>(sizes.heads);
  return {query.as<T>(heads), key.as<T>(heads), value.as<T>(heads), bias.as<float>(heads),
          static_cast<T*>(p_out), sizes.batch * sizes.heads, sizes.n,
          static_cast<int>(sizes.bases), scale, {}, false};
}

}  // namespace

extern "C" {

const char* last_kernel() { return emulator::last_kernel(); }

// Each of the others returns the bytes of extra memory, or -1 after an error.

int64_t em_statistics(
    const Sizes* sizes, const Rows* features, const Rows* payload, const float* p_bases,
    float temperature, bool normalize, float* p_sums, float* p_mass, float* p_payload) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    const auto call =
        em_call<decltype(type)>(*sizes, *features, *payload, p_bases, temperature, normalize);
    stem::em_statistics(context, call, p_sums, p_mass, p_payload);
  });
}

int64_t soft_em(
    const Sizes* sizes, const Rows* features, const Rows* payload, const float* p_bases,
    int64_t num_iters, float temperature, bool normalize, bool keep_empty, float least_mass,
    float* p_new_bases, float* p_mass, float* p_payload) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    const auto call =
        em_call<decltype(type)>(*sizes, *features, *payload, p_bases, temperature, normalize);
    stem::soft_em(context, call, num_iters, keep_empty, least_mass, p_new_bases, p_mass, p_payload);
  });
}

int64_t basis_attention(
    const Sizes* sizes, const Rows* query, const Rows* key, const Rows* value, const Rows* bias,
    const Rows* correction, const Rows* query_mean, float scale, void* p_out) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    using T = decltype(type);
    const auto call = attention_call<T>(*sizes, *query, *key, *value, *bias, scale, p_out);
    stem::basis_attention(context, call);
    if (correction->p == nullptr) return;
    const int heads = static_cast<int>(sizes->heads);
    stem::add_correction(
        context, stem::CorrectionCall<T>{call.query, correction->as<float>(heads),
                                         query_mean->as<float>(heads), call.p_out, call.leads,
                                         call.n});
  });
}

int64_t blended_attention(
    const Sizes* sizes, const Rows* query, const Rows* key, const Rows* query_source,
    const Rows* key_source, const Rows* value, const Rows* bias, const float* p_mask,
    int64_t mask_stride, float scale, void* p_out) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    using T = decltype(type);
    const int heads = static_cast<int>(sizes->heads);
    stem::blended_attention(
        context, attention_call<T>(*sizes, *query, *key, *value, *bias, scale, p_out),
        query_source->as<T>(heads), key_source->as<T>(heads), p_mask, mask_stride);
  });
}

int64_t nearest_token(
    const Sizes* sizes, const Rows* query, const Rows* keys, const float* p_inverse,
    int32_t* p_found) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    using T = decltype(type);
    const int heads = static_cast<int>(sizes->heads);
    stem::nearest_token(
        context, stem::NearestCall<T>{query->as<T>(heads), keys->as<T>(heads), p_inverse, p_found,
                                      sizes->batch * sizes->heads, sizes->n,
                                      static_cast<int>(sizes->bases)});
  });
}

int64_t partial_attention(
    const Sizes* sizes, const Rows* query, const Rows* key, const Rows* value, float scale,
    float* p_out, float* p_logsumexp) {
  return run(*sizes, [&](const stem::Context& context, auto type) {
    using T = decltype(type);
    const int heads = static_cast<int>(sizes->heads);
    stem::partial_attention(
        context, stem::PartialCall<T>{query->as<T>(heads), key->as<T>(heads), value->as<T>(heads),
                                      p_out, p_logsumexp, sizes->batch * sizes->heads,
                                      sizes->bases, static_cast<int>(sizes->n), scale});
  });
}
}
