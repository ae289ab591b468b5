#include "tensors.h"

#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace stem::cpu {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

namespace {

template <typename Sizes>
std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator;
    size < 0 ? text << "any" : text << size;
    separator = ", ";
  }
  return text.str() + "]";
}

}  // namespace

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  const auto found = tensor.sizes();
  bool fits = found.size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = sizes.begin()[i] < 0 || sizes.begin()[i] == found[i];
  STD_TORCH_CHECK(fits, name, " must be ", text_of(sizes), ", not ", text_of(found));
  STD_TORCH_CHECK(found.back() <= 1 || tensor.stride(tensor.dim() - 1) == 1, name,
                  " must be contiguous in its last dimension");
}

void check_floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  check(tensor, name, sizes);
  STD_TORCH_CHECK(dtype_of(tensor, name) == DType::kFloat, name, " must be float32");
}

Rows rows_of(const Tensor& tensor, DType dtype, int64_t batch, int64_t head) {
  const auto strides = tensor.strides();
  const int64_t bytes = dtype == DType::kFloat ? 4 : 2;
  const int64_t offset = batch * strides[0] + head * strides[1];
  return {static_cast<const char*>(tensor.const_data_ptr()) + offset * bytes, strides[2], dtype};
}

void advise_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kMapped = int64_t{1} << 25, kPage = 4096;
  if (bytes < kMapped) return;
  const int64_t before = (kPage - reinterpret_cast<intptr_t>(data) % kPage) % kPage;
  madvise(data + before, bytes - before, MADV_HUGEPAGE);
#endif
}

Correction correction_of(const Tensor& correction, const Tensor& query_mean, int64_t batch,
                         int64_t head) {
  return {static_cast<const float*>(rows_of(correction, DType::kFloat, batch, head).data),
          correction.stride(2),
          query_mean.const_data_ptr<float>() + batch * query_mean.stride(0) +
              head * query_mean.stride(1)};
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype,
             bool zero) {
  const IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  try {
    return zero ? torch::stable::new_zeros(like, shape, dtype)
                : torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
    double bytes = half ? 2.0 : 4.0;
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    STD_TORCH_CHECK(false, "out of memory: a tensor ", text_of(sizes), " needs ", bytes, " bytes");
  }
}

Tensor float_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, bool zero) {
  return empty(like, sizes, ScalarType::Float, zero);
}

}  // namespace stem::cpu
