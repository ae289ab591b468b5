// `em_statistics` and `soft_em` from raw pointers: which kernels a shape takes, and their order.
//
// Every sum is made in parts whose number depends on the shapes and the GPU alone, and which are
// added in a fixed order, so equal calls give equal bits.
#pragma once

#include "em_fused.cuh"
#include "em_update.cuh"
#include "em_wide.cuh"
#include "float32.cuh"

namespace stem {

constexpr int FUSED_BASES = 256;
constexpr int LARGEST_BASES = 1024;

template <typename T>
struct EmCall {
  View<T> features, payload;  // [B, h, n, D], [B, h, n, E]; E = 0 without a payload
  const float* p_bases;       // [B, h, K, D]
  int64_t leads, n;
  int bases;
  float temperature;
  bool normalize;
};

// [count, leads, K, width]
struct Parts {
  float* p = nullptr;
  int count = 0, width = 0;
};

// Ranges of whole tiles that `wanted` blocks share evenly, of `longest` tokens at most.
struct Ranges {
  int count = 0;
  int64_t tokens = 0;

  Ranges() = default;
  Ranges(int64_t n, int64_t tile, int64_t wanted, int64_t longest) {
    const int64_t tiles = ceil_div(n, tile);
    if (tiles == 0) return;
    const int64_t least = ceil_div(n, round_up(longest, tile));
    wanted = larger(wanted, smaller<int64_t>(least, LARGEST_GRID));
    tokens = ceil_div(tiles, smaller(tiles, larger<int64_t>(1, wanted))) * tile;
    count = static_cast<int>(ceil_div(n, tokens));
  }
};

// The E and the M step over all tokens, time after time in the same memory.
template <typename T>
class EmPass {
 public:
  EmPass(const Context& context, const EmCall<T>& call) : context_(context), call_(call) {
    const int warps = ceil_div(call.bases, 32), widest = larger(dim(), call.payload.width);
    const int64_t padded = round_up(call.bases, 128);  // whole warps of the kernels for many bases
    int steps = fused_steps(widest);
    if constexpr (!SINGLE) {
      fused_ = steps > 0 && call.bases <= FUSED_BASES &&
               fused_shared(steps, warps, call.payload.width > 0) <= context.shared_limit;
    }
    if (!fused_) steps = round_up(ceil_div(dim(), 16), 2);
    directions.steps = steps;
    directions.rows = SINGLE ? call.bases : static_cast<int>(padded);
    directions.columns = SINGLE ? dim() : 16 * steps;
    directions.stride = static_cast<int64_t>(directions.rows) * directions.columns;
    directions.p = context.make<T>(call.leads * directions.stride);

    if (fused_) {
      ranges_ = Ranges(call.n, 8 * fused_tiles(steps), context.programs() / call.leads, longest());
      mass = make_parts(ranges_.count, 1);
      sums = make_parts(ranges_.count, dim());
      payload = make_parts(ranges_.count, call.payload.width);
      return;
    }
    chunk_ = chunk_of(context.chunk_bytes, call.bases * static_cast<int64_t>(sizeof(T)), call.leads,
                      call.n, WIDE_TILE);
    p_z_ = context.make<T>(chunk_.leads * chunk_.tokens * call.bases);
    const int64_t chunks = ceil_div(call.n, larger<int64_t>(1, chunk_.tokens));
    const int groups = static_cast<int>(ceil_div(chunks, context.longest_sum));
    ranges_ = product_ranges(dim());
    payload_ranges_ = product_ranges(call.payload.width);
    sums = make_parts(groups * ranges_.count, dim());
    payload = make_parts(groups * payload_ranges_.count, call.payload.width);
    if constexpr (!SINGLE) {
      const int64_t tile = call.bases <= FUSED_BASES ? WideShape<2>::TOKENS : WideShape<8>::TOKENS;
      mass_ranges_ = Ranges(smaller(chunk_.tokens, call.n), tile,
                            context.programs() / chunk_.leads, longest());
      mass = make_parts(groups * mass_ranges_.count, 1);
    } else {
      mass = make_parts(groups * ranges_.count, 1);
    }
  }

  Directions<T> directions{};
  Parts sums, mass, payload;

  // The directions of the bases that the call gives.
  void begin() {
    const DirectionsArgs<T> args{call_.p_bases, directions, call_.bases, dim(), call_.normalize};
    launch("em_directions_kernel", em_directions_kernel<T>,
           dim3(static_cast<unsigned>(call_.leads * directions.rows)), LARGEST_BLOCK,
           LARGEST_BLOCK / WARP * 4, context_, args);
  }

  void run(bool with_payload) {
    with_payload = with_payload && call_.payload.width > 0;
    if (call_.n == 0) return;
    if (fused_) {
      fused(call_.features, false, sums.p, mass.p);
      if (with_payload) fused(call_.payload, true, payload.p, nullptr);
      return;
    }
    for (int64_t lead = 0; lead < call_.leads; lead += chunk_.leads)
      for (int64_t first = 0; first < call_.n; first += chunk_.tokens) {
        const int64_t chunk = first / chunk_.tokens;
        const Piece piece{
            lead, smaller(chunk_.leads, call_.leads - lead), first,
            smaller(chunk_.tokens, call_.n - first), chunk / context_.longest_sum,
            chunk % context_.longest_sum > 0};
        if constexpr (SINGLE) {
          single(piece, with_payload);
        } else {
          wide(piece, with_payload);
        }
      }
  }

 private:
  static constexpr bool SINGLE = std::is_same_v<T, float>;

  // Some leads' chunk of tokens. Its sums become the parts of a group, or are added to those of the
  // chunks before.
  struct Piece {
    int64_t lead, leads, first, count, group;
    bool add;
  };

  int64_t longest() const { return context_.longest_sum * (SINGLE ? 1 : MMA_DEPTH); }
  int dim() const { return call_.features.width; }
  float scale() const { return LOG2E / call_.temperature; }

  Parts make_parts(int count, int width) const {
    const int64_t size = call_.leads * call_.bases * static_cast<int64_t>(width);
    return {context_.make<float>(count * size), count, width};
  }

  Ranges product_ranges(int width) const {
    const int rows = SINGLE ? ProductShape::M : ProductsShape::BASES;
    const int columns = SINGLE ? ProductShape::N : ProductsShape::CHANNELS;
    const int64_t tiles = ceil_div(call_.bases, rows) * ceil_div(width, columns);
    const int64_t blocks = larger<int64_t>(1, chunk_.leads * tiles);
    return Ranges(
        smaller(chunk_.tokens, call_.n), WIDE_TILE, context_.programs() / blocks, longest());
  }

  void fused(const View<T>& values, bool separate, float* p_sums, float* p_mass) {
    if constexpr (!SINGLE) {
      launch_fused(context_, call_.features, values, separate, directions.p, directions.stride,
                   directions.steps, call_.leads, call_.n, ranges_.tokens, ranges_.count,
                   call_.bases, scale(), p_sums, p_mass);
    }
  }

  void wide(const Piece& piece, bool with_payload) {
    const int64_t rows = call_.leads * call_.bases, first_mass = piece.group * mass_ranges_.count;
    const ResponsibilitiesArgs<T> args{
        call_.features.from(piece.lead, piece.first), directions.p, p_z_,
        mass.p + first_mass * rows, chunk_.tokens, directions.stride, rows,
        static_cast<int>(piece.count), call_.bases, directions.steps, scale(), piece.add};
    const dim3 grid(
        static_cast<unsigned>(piece.leads), static_cast<unsigned>(mass_ranges_.count));
    auto run = [&](auto kernel, int m_tiles, auto shared) {
      const int warps = ceil_div(call_.bases, 16 * m_tiles);
      launch("em_responsibilities_kernel", kernel, grid, warps * WARP, shared(warps), context_,
             args);
    };
    if (call_.bases <= FUSED_BASES) {
      run(em_responsibilities_kernel<T, 2>, 2, WideShape<2>::shared);
    } else {
      run(em_responsibilities_kernel<T, 8>, 8, WideShape<8>::shared);
    }
    auto products = [&](const View<T>& values, const Ranges& ranges, const Parts& parts) {
      const int base_tiles = ceil_div(call_.bases, ProductsShape::BASES);
      const int value_tiles = ceil_div(values.width, ProductsShape::CHANNELS);
      const int64_t size = rows * parts.width;
      const ProductsArgs<T> args{
          values.from(piece.lead, piece.first), p_z_, parts.p + piece.group * ranges.count * size,
          chunk_.tokens, size, static_cast<int>(piece.count), static_cast<int>(ranges.tokens),
          call_.bases, base_tiles, value_tiles, piece.add};
      launch("em_products_kernel", em_products_kernel<T>,
             dim3(static_cast<unsigned>(piece.leads * base_tiles * value_tiles),
                  static_cast<unsigned>(ranges.count)),
             LARGEST_BLOCK, ProductsShape::SHARED, context_, args);
    };
    products(call_.features, ranges_, sums);
    if (with_payload) products(call_.payload, payload_ranges_, payload);
  }

  void single(const Piece& piece, bool with_payload) {
    const int64_t rows = call_.leads * call_.bases;
    const int64_t stride_z = chunk_.tokens * call_.bases;
    const View<float> z = view<float>(p_z_, stride_z, 0, call_.bases, 1, call_.bases);
    const View<float> bases =
        view<float>(directions.p, directions.stride, 0, dim(), 1, dim()).from(piece.lead, 0);
    launch_product<false, false>(
        context_,
        {call_.features.from(piece.lead, piece.first), bases, z, p_z_, nullptr, piece.count, dim(),
         dim(), 0, 0, call_.bases, false},
        piece.leads, 1);
    launch_softmax<float>(
        context_, {p_z_, {}, piece.leads, piece.count, stride_z, call_.bases, scale(), {}});
    auto products = [&](const View<float>& values, const Ranges& ranges, const Parts& parts,
                        float* p_mass) {
      const int64_t size = static_cast<int64_t>(call_.bases) * parts.width;
      const View<float> layout =
          view<float>(parts.p, size, 0, parts.width, 1, parts.width).from(piece.lead, 0);
      launch_product<true, true>(
          context_,
          {z, values.from(piece.lead, piece.first), layout,
           parts.p + piece.group * ranges.count * rows * parts.width, p_mass, call_.bases,
           piece.count, ranges.tokens, rows * parts.width, rows, values.width, piece.add},
          piece.leads, ranges.count);
    };
    products(call_.features, ranges_, sums, mass.p + piece.group * ranges_.count * rows);
    if (with_payload) products(call_.payload, payload_ranges_, payload, nullptr);
  }

  const Context& context_;
  const EmCall<T> call_;
  bool fused_ = false;
  Ranges ranges_, payload_ranges_, mass_ranges_;
  Chunk chunk_{};
  T* p_z_ = nullptr;
};

// Adds up parts, and makes bases and directions of them as UpdateArgs says.
template <typename T>
void update(
    const Context& context, const EmCall<T>& call, const Parts& parts, const Parts& mass,
    UpdateArgs<T> args) {
  if (parts.width == 0) return;
  args.p_parts = parts.p;
  args.p_mass_parts = mass.p;
  args.rows = call.leads * call.bases;
  args.parts = parts.count;
  args.mass_parts = mass.count;
  args.width = parts.width;
  args.bases = call.bases;
  launch("em_update_kernel", em_update_kernel<T>, dim3(static_cast<unsigned>(args.rows)),
         LARGEST_BLOCK, update_shared(args.width), context, args);
}

// p_sums [B, h, K, D], p_mass [B, h, K], p_payload [B, h, K, E]
template <typename T>
void em_statistics(
    const Context& context, const EmCall<T>& call, float* p_sums, float* p_mass, float* p_payload) {
  if (call.leads == 0) return;
  EmPass<T> pass(context, call);
  pass.begin();
  pass.run(true);
  UpdateArgs<T> args{};
  args.p_out = p_sums;
  args.p_mass = p_mass;
  update(context, call, pass.sums, pass.mass, args);
  args.p_out = p_payload;
  args.p_mass = nullptr;
  update(context, call, pass.payload, pass.mass, args);
}

// The same sizes; a base with less than least_mass is kept and has mass 0 if keep_empty.
template <typename T>
void soft_em(
    const Context& context, const EmCall<T>& call, int64_t num_iters, bool keep_empty,
    float least_mass, float* p_bases, float* p_mass, float* p_payload) {
  if (call.leads == 0) return;
  EmPass<T> pass(context, call);
  pass.begin();
  for (int64_t iteration = 0; iteration < num_iters; ++iteration) {
    const bool last = iteration == num_iters - 1;
    pass.run(last);
    UpdateArgs<T> args{};
    args.divide = true;
    if (last) {
      args.p_out = p_payload;
      update(context, call, pass.payload, pass.mass, args);
    }
    if (keep_empty) args.p_old = iteration == 0 ? call.p_bases : p_bases;
    args.p_out = p_bases;
    args.p_mass = p_mass;
    args.least_mass = least_mass;
    args.normalize = call.normalize;
    if (!last) args.directions = pass.directions;
    update(context, call, pass.sums, pass.mass, args);
  }
}

}  // namespace stem
