// em_statistics and soft_em on the CPU: checks, threads, iterations.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "tensors.h"

namespace stem::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// A head's tokens are cut into parts for threads, each with sums of its own. How many depends on
// the shapes alone, so that equal calls give equal bits on any number of threads: a power of two,
// up to 64 for all heads, of at least 512 tokens, with at most 32 MiB of sums.
constexpr int64_t kTasks = 64, kTokensPerPart = 512, kSumsBytes = int64_t{1} << 25;

using Result = std::tuple<Tensor, Tensor, Tensor>;

// The heads of one call, and their bases and sums in panels.
class Em {
 public:
  Em(const Tensor& features, const Tensor& bases, const std::optional<Tensor>& payload,
     double temperature, bool normalize)
      : features_(features),
        payload_(payload.value_or(features)),
        dtype_(dtype_of(features, "features")),
        normalize_(normalize),
        scale_(kLog2E / temperature) {
    check(features, "features", {-1, -1, -1, -1});
    batch_ = features.size(0), heads_ = features.size(1), tokens_ = features.size(2);
    check(bases, "bases", {batch_, heads_, -1, features.size(3)});
    STD_TORCH_CHECK(dtype_of(bases, "bases") == DType::kFloat && bases.is_contiguous(),
                    "bases must be contiguous and float32");
    STD_TORCH_CHECK(bases.size(2) > 0 && bases.size(3) > 0, "K and D must be at least 1");
    if (payload) {
      check(*payload, "payload", {batch_, heads_, tokens_, -1});
      STD_TORCH_CHECK(dtype_of(*payload, "payload") == dtype_, "payload must be ",
                      "of the features' dtype");
    }
    sizes_ = {bases.size(2), bases.size(3), payload ? payload_.size(3) : 0};
    panels_ = (sizes_.bases + kernel_.panel - 1) / kernel_.panel;
    parts_ = 1;
    const int64_t all_sums = head_sums() * batch_ * heads_ * static_cast<int64_t>(sizeof(float));
    while (2 * parts_ * batch_ * heads_ <= kTasks && 2 * parts_ * kTokensPerPart <= tokens_ &&
           2 * parts_ * all_sums <= kSumsBytes)
      parts_ *= 2;
    bases_ = float_tensor(features, {batch_ * heads_, panels_, sizes_.width, kernel_.panel});
    directions_ = float_tensor(features, {batch_ * heads_, panels_, sizes_.width, kernel_.panel});
    sums_ = float_tensor(features, {batch_ * heads_ * parts_ * head_sums()});
    each_panel([&](int64_t head, int64_t panel) {
      kernel_.load_panel(bases.const_data_ptr<float>() + head * sizes_.bases * sizes_.width,
                         sizes_.bases, sizes_.width, panel, bases_panel(head, panel));
      make_directions(head, panel);
    });
  }

  int64_t tokens() const { return tokens_; }

  // The statistics of all tokens, in the first part's sums.
  void pass(bool with_payload) {
    EmSizes sizes = sizes_;
    if (!with_payload) sizes.payload_width = 0;
    current_ = sizes;
    parallel_for(
        0, batch_ * heads_ * parts_, 1, [&](int64_t begin, int64_t end) {
          const Scratch scratch(kernel_.em_scratch(sizes));
          for (int64_t task = begin; task < end; ++task) {
            const int64_t head = task / parts_, part = task % parts_;
            kernel_.em_pass(sizes, rows_of(features_, dtype_, head / heads_, head % heads_),
                            rows_of(payload_, dtype_, head / heads_, head % heads_),
                            tokens_ * part / parts_, tokens_ * (part + 1) / parts_,
                            directions_panel(head, 0), sums(head, part, 0), scratch.get());
          }
        });
    each_panel([&](int64_t head, int64_t panel) {
      kernel_.add_parts(sums(head, 0, panel), parts_, sums(head, 1, 0) - sums(head, 0, 0),
                        current_.columns() * kernel_.panel);
    });
  }

  // New bases from the last pass; its mass and payload sums become mass and payload bases.
  void update(bool keep_empty, float least_mass) {
    each_panel([&](int64_t head, int64_t panel) {
      kernel_.update(current_, keep_empty, least_mass, sums(head, 0, panel),
                     bases_panel(head, panel));
      make_directions(head, panel);
    });
  }

  // The last pass's sums, or the bases after an update; mass; what stands for the payload.
  Result result(bool updated) {
    const int64_t num_bases = sizes_.bases, width = sizes_.width, other = sizes_.payload_width;
    const Tensor first = float_tensor(features_, {batch_, heads_, num_bases, width});
    const Tensor mass = float_tensor(features_, {batch_, heads_, num_bases});
    const Tensor last = float_tensor(features_, {batch_, heads_, num_bases, other});
    float* to_first = first.mutable_data_ptr<float>();
    float* to_mass = mass.mutable_data_ptr<float>();
    float* to_last = last.mutable_data_ptr<float>();
    each_panel([&](int64_t head, int64_t panel) {
      const float* from = sums(head, 0, panel);
      kernel_.store_panel(updated ? bases_panel(head, panel) : from, num_bases, width, panel,
                          to_first + head * num_bases * width);
      from += width * kernel_.panel;
      kernel_.store_panel(from, num_bases, 1, panel, to_mass + head * num_bases);
      kernel_.store_panel(from + kernel_.panel, num_bases, other, panel,
                          to_last + head * num_bases * other);
    });
    return {first, mass, last};
  }

 private:
  int64_t head_sums() const { return panels_ * sizes_.columns() * kernel_.panel; }

  float* sums(int64_t head, int64_t part, int64_t panel) const {
    return sums_.mutable_data_ptr<float>() + (head * parts_ + part) * head_sums() +
           panel * current_.columns() * kernel_.panel;
  }
  float* bases_panel(int64_t head, int64_t panel) const {
    return bases_.mutable_data_ptr<float>() +
           (head * panels_ + panel) * sizes_.width * kernel_.panel;
  }
  float* directions_panel(int64_t head, int64_t panel) const {
    return directions_.mutable_data_ptr<float>() +
           (head * panels_ + panel) * sizes_.width * kernel_.panel;
  }
  void make_directions(int64_t head, int64_t panel) const {
    kernel_.directions(bases_panel(head, panel), sizes_.width, normalize_, scale_,
                       directions_panel(head, panel));
  }

  template <typename Work>
  void each_panel(const Work& work) const {
    parallel_for(
        0, batch_ * heads_ * panels_, 1, [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) work(task / panels_, task % panels_);
        });
  }

  const Kernels& kernel_ = kernels();
  Tensor features_, payload_, bases_, directions_, sums_;
  DType dtype_;
  bool normalize_;
  double scale_;
  int64_t batch_, heads_, tokens_, panels_, parts_;
  EmSizes sizes_, current_;
};

Result em_statistics(const Tensor& features, const Tensor& bases,
                     const std::optional<Tensor>& payload, double temperature, bool normalize) {
  Em em(features, bases, payload, temperature, normalize);
  if (em.tokens() == 0) {
    const int64_t batch = bases.size(0), heads = bases.size(1), num_bases = bases.size(2);
    return {float_tensor(bases, {batch, heads, num_bases, bases.size(3)}, true),
            float_tensor(bases, {batch, heads, num_bases}, true),
            float_tensor(bases, {batch, heads, num_bases, payload ? payload->size(3) : 0}, true)};
  }
  em.pass(true);
  return em.result(false);
}

Result soft_em(const Tensor& features, const Tensor& bases, const std::optional<Tensor>& payload,
               int64_t num_iters, double temperature, bool normalize, bool keep_empty,
               double least_mass) {
  Em em(features, bases, payload, temperature, normalize);
  STD_TORCH_CHECK(em.tokens() > 0, "there must be a token");
  STD_TORCH_CHECK(num_iters > 0, "num_iters is ", num_iters, "; it must be at least 1");
  for (int64_t iteration = 1; iteration <= num_iters; ++iteration) {
    em.pass(iteration == num_iters);
    em.update(keep_empty, static_cast<float>(least_mass));
  }
  const auto [found, mass, payload_bases] = em.result(true);
  return {found, payload_bases, mass};
}

std::string cpu_instructions() { return kernels().name; }

}  // namespace
}  // namespace stem::cpu

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CPU, library) {
  library.impl("em_statistics", TORCH_BOX(&stem::cpu::em_statistics));
  library.impl("soft_em", TORCH_BOX(&stem::cpu::soft_em));
}

STABLE_TORCH_LIBRARY_IMPL(stem_kernels_ext, CompositeExplicitAutograd, library) {
  library.impl("cpu_instructions", TORCH_BOX(&stem::cpu::cpu_instructions));
}
