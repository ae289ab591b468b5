// What the launchers share: torch's tensors, through its stable ABI, as the kernels' views; memory,
// stream and device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "stem/copy.cuh"

namespace stem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < count; ++i)
    text << (i == 0 ? "" : ", ") << (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  return text.str() + "]";
}

// Throws unless the tensor has these sizes (-1: any) and this dtype, and lies where `like` does.
inline void check(
    const char* name, const Tensor& tensor, const Tensor& like, ScalarType dtype,
    std::initializer_list<int64_t> sizes) {
  const auto found = tensor.sizes();
  bool fits = found.size() == sizes.size();
  for (size_t i = 0; fits && i < sizes.size(); ++i)
    fits = sizes.begin()[i] < 0 || sizes.begin()[i] == found[i];
  STD_TORCH_CHECK(fits, name, " is ", text_of(found.data(), found.size()), "; it must be ",
                  text_of(sizes.begin(), sizes.size()));
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the GPU that the other tensors are on: move it there");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than is wanted: ",
                  "convert it to ", dtype == ScalarType::Float ? "float32" : "that of the tokens");
}

// `call` with a number of the dtype that a tensor has.
template <typename Call>
void dispatch(const char* name, const Tensor& tensor, Call call) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return call(float());
    case ScalarType::Half:
      return call(__half());
    case ScalarType::BFloat16:
      return call(__nv_bfloat16());
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16: convert it");
  }
}

// Of [B, h, n, width].
template <typename T>
View<T> view_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, name,
                  " has a stride of ", tensor.stride(3), " between the numbers of a row; ",
                  "call .contiguous() on it");
  STD_TORCH_CHECK(tensor.size(2) <= std::numeric_limits<int>::max(), name, " has ", tensor.size(2),
                  " rows; cut it into pieces of less than 2^31");
  return view(static_cast<const T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1),
              tensor.stride(2), static_cast<int>(tensor.size(1)), static_cast<int>(tensor.size(3)));
}

// Built for an older torch, its function keeps no text of what was thrown, by which
// stem_kernels/shared/memory.py knows that memory is lacking.
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
  } catch (const std::exception&) {
    size_t left = 0, all = 0;
    // After a kernel's error every call fails, and not for want of memory.
    if (cudaMemGetInfo(&left, &all) != cudaSuccess) throw;
    const bool half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
    double bytes = dtype == ScalarType::Byte ? 1.0 : half ? 2.0 : 4.0;
    for (const int64_t size : sizes) bytes *= static_cast<double>(size);
    STD_TORCH_CHECK(false, "out of memory: a tensor ", text_of(sizes.data(), sizes.size()),
                    " needs ", bytes, " bytes; the GPU has ", left, " free");
  }
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// The device of a tensor, its current stream, and memory from torch's allocator. That memory goes
// back when the operator returns: work on the same stream, which alone may get it, comes later.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const int index = tensor.get_device_index();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    context = {static_cast<cudaStream_t>(stream),
               attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
               attribute(cudaDevAttrMultiProcessorCount, index), [this, tensor](int64_t bytes) {
                 kept_.push_back(empty(tensor, {bytes}, ScalarType::Byte));
                 return kept_.back().data_ptr();
               }};
  }
  Device(const Device&) = delete;

  Context context;

 private:
  static int attribute(cudaDeviceAttr name, int index) {
    int found = 0;
    const cudaError_t status = cudaDeviceGetAttribute(&found, name, index);
    STD_TORCH_CHECK(status == cudaSuccess, "cudaDeviceGetAttribute: ", cudaGetErrorString(status));
    return found;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> kept_;
};

}  // namespace stem
