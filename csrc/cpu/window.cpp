// window_attention and video_attention on the CPU: checks, threads, one head after the other.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace stem::cpu {
namespace {

constexpr int64_t kPlacesPerTask = 4;

struct Grid {
  int64_t frames, rows, columns, window;
};

// What both operators have in common, checked.
struct Call {
  DType dtype;
  int64_t batch, heads, tokens;
  WindowSizes sizes;
  float scale;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const Grid& grid, double scale)
      : dtype(dtype_of(query, "query")), scale(static_cast<float>(scale)) {
    check(query, "query", {-1, -1, -1, -1});
    batch = query.size(0), heads = query.size(1), tokens = query.size(2);
    check(key, "key", {batch, heads, tokens, query.size(3)});
    check(value, "value", {batch, heads, tokens, -1});
    STD_TORCH_CHECK(dtype_of(key, "key") == dtype && dtype_of(value, "value") == dtype,
                    "query, key and value must have one dtype");
    STD_TORCH_CHECK(grid.frames > 0 && grid.rows > 0 && grid.columns > 0 && grid.window >= 0 &&
                        grid.frames * grid.rows * grid.columns == tokens,
                    "frames x rows x columns must be the number of tokens, and window at least 0");
    sizes = {grid.frames, grid.rows, grid.columns, grid.window, query.size(3), value.size(3), 0, 0};
  }

  // Runs every head; `operands_of` (b, head) gives what bases and text are.
  template <typename Operands>
  void each_head(const Tensor& query, const Tensor& key, const Tensor& value,
                 const Tensor* assignment, const Operands& operands_of, DType to, char* out,
                 int64_t batch_stride, int64_t head_stride, int64_t out_stride, float* peaks,
                 float* masses) const {
    const Kernels& kernel = kernels();
    const Scratch keys(tokens * sizes.width), values(tokens * sizes.value_columns());
    std::vector<int32_t> numbers(assignment ? tokens : 0);
    const int64_t bytes = to == DType::kFloat ? 4 : 2;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t lead = (b * heads + head) * tokens;
        const Rows queries = rows_of(query, dtype, b, head);
        parallel_for(
            0, sizes.places(), kPlacesPerTask, [&](int64_t first, int64_t last) {
              kernel.place_tokens(sizes, rows_of(key, dtype, b, head),
                                  rows_of(value, dtype, b, head),
                                  assignment ? assignment->const_data_ptr<int32_t>() + lead : nullptr,
                                  first, last, keys.get(), values.get(), numbers.data());
            });
        WindowOperands operands = operands_of(b, head);
        operands.keys = keys.get(), operands.values = values.get();
        operands.numbers = numbers.data();
        parallel_for(
            0, sizes.places(), kPlacesPerTask, [&](int64_t first, int64_t last) {
              const Scratch scratch(kernel.window_scratch(sizes));
              kernel.window_attention(
                  sizes, operands, queries, scale, first, last, to,
                  out + (b * batch_stride + head * head_stride) * bytes, out_stride,
                  peaks ? peaks + lead : nullptr, masses ? masses + lead : nullptr, scratch.get());
            });
      }
  }
};

std::tuple<Tensor, Tensor> window_attention(const Tensor& query, const Tensor& key,
                                            const Tensor& value, int64_t frames, int64_t rows,
                                            int64_t columns, int64_t window, double scale) {
  const Call call(query, key, value, {frames, rows, columns, window}, scale);
  const int64_t batch = call.batch, heads = call.heads, tokens = call.tokens;
  const int64_t width = call.sizes.value_width;
  const Tensor output = float_tensor(query, {batch, heads, tokens, width});
  const Tensor logsumexp = float_tensor(query, {batch, heads, tokens});
  const Tensor masses = float_tensor(query, {batch, heads, tokens});
  float *peak = logsumexp.mutable_data_ptr<float>(), *mass = masses.mutable_data_ptr<float>();
  call.each_head(
      query, key, value, nullptr, [](int64_t, int64_t) { return WindowOperands{}; }, DType::kFloat,
      static_cast<char*>(output.mutable_data_ptr()), heads * tokens * width, tokens * width, width,
      peak, mass);
  constexpr double kLn2 = 0.69314718055994531;
  for (int64_t i = 0; i < batch * heads * tokens; ++i)
    peak[i] = static_cast<float>(peak[i] * kLn2 + std::log(static_cast<double>(mass[i])));
  return {output, logsumexp};
}

// `tensor` is float32 of these sizes, contiguous, or absent.
const float* floats_of(const std::optional<Tensor>& tensor, const char* name,
                       std::initializer_list<int64_t> sizes) {
  if (!tensor) return nullptr;
  check_floats(*tensor, name, sizes);
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  return tensor->const_data_ptr<float>();
}

Tensor video_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                       const Tensor& assignment, const Tensor& base_key, const Tensor& base_sums,
                       const std::optional<Tensor>& text_key,
                       const std::optional<Tensor>& text_value,
                       const std::optional<Tensor>& text_bias, const std::optional<Tensor>& matrix,
                       int64_t frames, int64_t rows, int64_t columns, int64_t window,
                       double scale) {
  Call call(query, key, value, {frames, rows, columns, window}, scale);
  const int64_t batch = call.batch, heads = call.heads, tokens = call.tokens;
  WindowSizes& sizes = call.sizes;
  const int64_t width = sizes.width, value_columns = sizes.value_columns();
  check(assignment, "assignment", {batch, heads, tokens});
  STD_TORCH_CHECK(assignment.scalar_type() == torch::headeronly::ScalarType::Int &&
                      assignment.is_contiguous(),
                  "assignment must be int32 and contiguous");
  sizes.bases = base_key.dim() == 4 ? base_key.size(2) : 0;
  sizes.texts = text_key && text_key->dim() == 4 ? text_key->size(2) : 0;
  STD_TORCH_CHECK(sizes.bases > 0, "there must be at least one base");
  STD_TORCH_CHECK(text_key.has_value() == text_value.has_value(),
                  "text must have keys and values, or neither");
  const int32_t* numbers = assignment.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < batch * heads * tokens; ++i)
    STD_TORCH_CHECK(numbers[i] >= 0 && numbers[i] < sizes.bases, "assignment has ", numbers[i],
                    "; there are ", sizes.bases, " bases");
  const float* base_keys =
      floats_of(base_key, "base_key", {batch, heads, sizes.bases, width});
  const float* sums =
      floats_of(base_sums, "base_sums", {batch, heads, sizes.bases, value_columns});
  const float* text_keys = floats_of(text_key, "text_key", {batch, heads, sizes.texts, width});
  const float* text_values =
      floats_of(text_value, "text_value", {batch, heads, sizes.texts, value_columns});
  const float* bias = floats_of(text_bias, "text_bias", {batch, sizes.texts});
  const float* matrices = floats_of(matrix, "matrix", {batch, heads, width, sizes.value_width});
  // The mean key of a base without tokens is 0: its logit must not count as the largest.
  std::vector<float> base_bias(batch * heads * sizes.bases);
  for (size_t base = 0; base < base_bias.size(); ++base)
    base_bias[base] = sums[base * value_columns + sizes.value_width] == 0.0f ? -INFINITY : 0.0f;
  const Tensor out = empty(query, {batch, tokens, heads, sizes.value_width}, query.scalar_type());
  call.each_head(
      query, key, value, &assignment,
      [&](int64_t b, int64_t head) {
        const int64_t lead = b * heads + head;
        WindowOperands found{};
        found.base_keys = base_keys + lead * sizes.bases * width;
        found.base_sums = sums + lead * sizes.bases * value_columns;
        found.base_bias = base_bias.data() + lead * sizes.bases;
        if (sizes.texts > 0) {
          found.text_keys = text_keys + lead * sizes.texts * width;
          found.text_values = text_values + lead * sizes.texts * value_columns;
          found.text_bias = bias ? bias + b * sizes.texts : nullptr;
        }
        if (matrices) found.matrix = matrices + lead * width * sizes.value_width;
        return found;
      },
      call.dtype, static_cast<char*>(out.mutable_data_ptr()), tokens * heads * sizes.value_width,
      sizes.value_width, heads * sizes.value_width, nullptr, nullptr);
  return out;
}

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("window_attention", TORCH_BOX(&stem::cpu::window_attention));
  library.impl("video_attention", TORCH_BOX(&stem::cpu::video_attention));
}
