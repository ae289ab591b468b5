// What the launchers share: tensors of torch's stable ABI as the kernels' rows, and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>

#include "stem/cpu/kernels.h"

namespace stem::cpu {

using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name);

// Throws unless the tensor is on the CPU, has these sizes (-1: any), and its last is contiguous.
void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes);

// The same of a float32 tensor.
void check_floats(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes);

// The rows of one head of a [B, h, n, width] tensor.
Rows rows_of(const Tensor& tensor, DType dtype, int64_t batch, int64_t head);

// From 32 MiB on glibc maps every allocation anew, in pages of 4 KiB, and writing to them for the
// first time took a quarter of attention at 80 channels. Advice that is not taken changes nothing.
void advise_huge_pages(char* data, int64_t bytes);

// One head's correction [B, h, d + 1, e] and mean query [B, h, d], checked before.
Correction correction_of(const Tensor& correction, const Tensor& query_mean, int64_t batch,
                         int64_t head);

// Torch's functions, which in a build for an older torch keep no text of what was thrown; by it
// stem_kernels/shared/memory.py knows that memory is lacking.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes,
             torch::headeronly::ScalarType dtype, bool zero = false);

// The same of float32.
Tensor float_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, bool zero = false);

// Torch's, which likewise keeps nothing of what a task threw.
template <typename Task>
void parallel_for(int64_t begin, int64_t end, int64_t at_once, const Task& task) {
  std::exception_ptr thrown;
  std::mutex alone;
  torch::stable::parallel_for(begin, end, at_once, [&](int64_t first, int64_t last) {
    try {
      task(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(alone);
      thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// Uninitialised floats on a cache line's boundary.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<float*>(
            ::operator new(count * sizeof(float), kAlignment, std::nothrow))) {
    STD_TORCH_CHECK(data_ != nullptr, "out of memory: a task needs ", count, " floats");
  }
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace stem::cpu
