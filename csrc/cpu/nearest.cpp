// nearest_token on the CPU: checks, threads, launch.
#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace stem::cpu {
namespace {

constexpr int64_t kTilesPerTask = 4;  // so that the last threads do not wait for long

Tensor nearest_token(const Tensor& query, const Tensor& keys, const Tensor& inverse_norms) {
  const DType dtype = dtype_of(query, "query");
  check(query, "query", {-1, -1, -1, -1});
  const int64_t batch = query.size(0), heads = query.size(1), num_queries = query.size(2);
  const int64_t width = query.size(3);
  check(keys, "keys", {batch, heads, -1, width});
  const int64_t num_keys = keys.size(2);
  check(inverse_norms, "inverse_norms", {batch, heads, num_keys});
  STD_TORCH_CHECK(dtype_of(keys, "keys") == dtype, "query and keys must have one dtype");
  STD_TORCH_CHECK(dtype_of(inverse_norms, "inverse_norms") == DType::kFloat &&
                      inverse_norms.is_contiguous(),
                  "inverse_norms must be contiguous and float32");
  STD_TORCH_CHECK(num_keys > 0 && width > 0, "there must be a key, of at least one channel");
  const Kernels& kernel = kernels();
  const int64_t panels = (num_keys + kernel.panel - 1) / kernel.panel;
  const int64_t size = panels * kernel.panel * width;
  const Tensor packed = float_tensor(query, {batch * heads, size});
  const float* factors = inverse_norms.const_data_ptr<float>();
  float* packed_data = packed.mutable_data_ptr<float>();
  parallel_for(
      0, batch * heads * panels, 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch(width);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t head = task / panels, panel = task % panels;
          kernel.pack_keys(rows_of(keys, dtype, head / heads, head % heads),
                           factors + head * num_keys, num_keys, width, panel,
                           packed_data + task * kernel.panel * width, scratch.get());
        }
      });
  const Tensor out =
      empty(query, {batch, heads, num_queries}, torch::headeronly::ScalarType::Int);
  int32_t* out_data = out.mutable_data_ptr<int32_t>();
  const int64_t at_once = kTilesPerTask * kernel.tile;
  const int64_t parts = (num_queries + at_once - 1) / at_once;
  parallel_for(
      0, batch * heads * parts, 1, [&](int64_t begin, int64_t end) {
        const Scratch scratch(kernel.nearest_scratch(width));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t head = task / parts, first = task % parts * at_once;
          const int64_t last = first + at_once < num_queries ? first + at_once : num_queries;
          kernel.nearest(rows_of(query, dtype, head / heads, head % heads), num_keys, width, first,
                         last, packed_data + head * size, out_data + head * num_queries,
                         scratch.get());
        }
      });
  return out;
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("nearest_token", TORCH_BOX(&stem::cpu::nearest_token));
}
