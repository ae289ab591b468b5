// The operators' schemas, which the CPU and the CUDA object implement. Shapes and formulas are in
// stem_kernels/ops; the fakes are in stem_kernels/cuda.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(stem_kernels_ext, library) {
  library.def(
      "em_statistics(Tensor features, Tensor bases, Tensor? payload, float temperature, "
      "bool normalize) -> (Tensor, Tensor, Tensor)");
  library.def(
      "soft_em(Tensor features, Tensor bases, Tensor? payload, int num_iters, float temperature, "
      "bool normalize, bool keep_empty, float least_mass) -> (Tensor, Tensor, Tensor)");
  library.def(
      "basis_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? correction, Tensor? query_mean, float scale) -> Tensor");
  library.def(
      "blended_attention(Tensor query_target, Tensor key_target, Tensor query_source, "
      "Tensor key_source, Tensor value, Tensor mask, Tensor? bias, float scale) -> Tensor");
  library.def(
      "projected_attention(Tensor tokens, Tensor query_weight, Tensor? query_bias, Tensor key, "
      "Tensor value, Tensor output_weight, Tensor? output_bias, Tensor? bias, Tensor? correction, "
      "Tensor? query_mean, float scale) -> Tensor");
  library.def(
      "partial_attention(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor, Tensor)");
  library.def(
      "window_attention(Tensor query, Tensor key, Tensor value, int frames, int rows, int columns, "
      "int window, float scale) -> (Tensor, Tensor)");
  library.def(
      "video_attention(Tensor query, Tensor key, Tensor value, Tensor assignment, "
      "Tensor base_key, Tensor base_sums, Tensor? text_key, Tensor? text_value, "
      "Tensor? text_bias, Tensor? matrix, int frames, int rows, int columns, int window, "
      "float scale) -> Tensor");
  library.def("nearest_token(Tensor query, Tensor keys, Tensor inverse_norms) -> Tensor");
  library.def("cpu_instructions() -> str");
}
