// Prints the dynamic shared memory that the largest launch of each 16-bit kernel asks for:
// kernel, template arguments, bytes. Its argument is the bytes that a block may have.

#include <cstdio>
#include <cstdlib>

#include "stem/attention.cuh"
#include "stem/correction.cuh"
#include "stem/em.cuh"
#include "stem/nearest.cuh"
#include "stem/partial.cuh"

template <int STEPS>
void print_attention(int limit) {
  using Shape = stem::AttentionShape<STEPS>;
  const auto bytes = Shape::shared(Shape::resident(stem::LARGEST_BASES, limit));
  std::printf("attention_kernel %d %lld\n", STEPS, static_cast<long long>(bytes));
}

void print_direct_attention(int limit) {
  using Shape = stem::AttentionShape<5, false>;
  const auto bytes = Shape::shared(Shape::resident(stem::LARGEST_BASES, limit));
  std::printf("attention_direct_kernel 5 %lld\n", static_cast<long long>(bytes));
}

int main(int count, char** arguments) {
  if (count != 2) return 1;
  const int limit = std::atoi(arguments[1]), warps = stem::LARGEST_BLOCK / stem::WARP;
  print_attention<3>(limit);
  print_attention<4>(limit);
  print_attention<5>(limit);
  print_attention<10>(limit);
  print_direct_attention(limit);
  for (int steps : {3, 4, 5, 10})
    for (bool separate : {false, true}) {
      const auto bytes = stem::fused_shared(steps, warps, separate);
      // Where it does not fit, em.cuh takes the kernels for wide tokens.
      if (bytes <= limit)
        std::printf("em_fused_kernel %d %lld\n", steps, static_cast<long long>(bytes));
    }
  std::printf("em_responsibilities_kernel 2 %lld\n",
              static_cast<long long>(stem::WideShape<2>::shared(warps)));
  std::printf("em_responsibilities_kernel 8 %lld\n",
              static_cast<long long>(stem::WideShape<8>::shared(warps)));
  std::printf("em_products_kernel 0 %d\n", stem::ProductsShape::SHARED);
  std::printf("nearest_kernel 0 %d\n", stem::NearestShape::SHARED);
  std::printf("correction_kernel 0 %lld\n",
              static_cast<long long>(stem::CorrectionShape::shared(stem::ATTENTION_WIDTH)));
  for (int count : {8, 20})
    std::printf("partial_kernel %d %lld\n", count,
                static_cast<long long>(stem::PartialShape::shared(
                    stem::PARTIAL_WIDTH, count * stem::PartialShape::SIDE)));
  std::printf("float32_product_kernel 0 %d\n", stem::ProductShape::SHARED);
  std::printf("em_update_kernel 0 %lld\n", static_cast<long long>(stem::update_shared(1280)));
}
