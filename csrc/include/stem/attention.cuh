// Attention of every token to a few bases: softmax(scale q k^T + bias) v.
//
// 16 bits: keys and values of a head lie in shared memory while a block's queries pass by; 256 of
// them at most, and where a head has more, they come by turns for each tile of queries. A warp owns
// 16 queries, so it waits for no other; they pass through shared memory, too, unless there is room
// for all bases without them only. Logits of 32 or 64 bases are held at a time, and what the earlier
// ones gave is rescaled. float32: two products and a softmax over a chunk of queries.
#pragma once

#include "copy.cuh"
#include "float32.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace stem {

constexpr int ATTENTION_WIDTH = 160;  // the largest d and e

template <typename T>
struct AttentionCall {
  View<T> query, key, value;  // [B, h, n, d], [B, h, K, d], [B, h, K, e]
  View<float> bias;           // [B, h, K, 1], or null
  T* p_out;                   // [B, n, h, e]
  int64_t leads, n;
  int bases;
  float scale;
  Shares shares;
  bool add;  // to what p_out holds
};

template <typename T>
struct AttentionArgs {
  AttentionCall<T> call;
  int resident;  // bases in shared memory, a multiple of PART
};

template <int STEPS, bool STAGED = true>
struct AttentionShape {
  static constexpr int WIDTH = 16 * STEPS, PITCH = pitch_of(WIDTH);
  static constexpr int WARPS = LARGEST_BLOCK / WARP, ROWS = 16, QUERIES = WARPS * ROWS;
  // Up to 80 channels, 128 registers do for logits of 32 bases: two blocks share a multiprocessor.
  static constexpr int PART = STEPS > 5 ? 64 : 32, RESIDENT = 256;
  static int64_t shared(int resident) {
    return resident * (2 * PITCH * 2 + 4) + (STAGED ? QUERIES * PITCH * 2 : 0);
  }
  // How many of a head's bases are kept in so many bytes.
  static int resident(int bases, int limit) {
    int count = smaller(RESIDENT, round_up(bases, PART));
    while (count > PART && shared(count) > limit) count -= PART;
    return count;
  }
};

template <typename T, int STEPS, bool STAGED>
__device__ inline void attend(const AttentionArgs<T>& args) {
  using Shape = AttentionShape<STEPS, STAGED>;
  constexpr int WIDTH = Shape::WIDTH, PITCH = Shape::PITCH, PART = Shape::PART;
  constexpr int N_TILES = PART / 8, ROWS = Shape::ROWS;
  const AttentionCall<T>& call = args.call;
  const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
  const int64_t lead = blockIdx.x;
  STEM_SHARED(shared);
  // [resident, PITCH] each, [resident], [WARPS, ROWS, PITCH]
  T* b_key = reinterpret_cast<T*>(shared);
  T* b_value = b_key + args.resident * PITCH;
  float* b_bias = reinterpret_cast<float*>(b_value + args.resident * PITCH);
  T* b_query = reinterpret_cast<T*>(b_bias + args.resident) + warp * ROWS * PITCH;

  const T* p_query = call.query.at(lead);
  // A fragments of [ROWS, WIDTH]; `ahead` are those of the next tile.
  uint32_t q[STEPS][4], ahead[STAGED ? 1 : STEPS][4];
  auto fetch_query = [&](int64_t start) {
    const T* p = p_query + start * call.query.stride_n;
    const int rows = static_cast<int>(smaller<int64_t>(ROWS, call.n - start));
    if constexpr (STAGED) {
      load_rows<ROWS, WIDTH>(
          b_query, p, call.query.stride_n, rows, call.query.width, call.query.vectors, lane, WARP);
    } else {
      auto fetch = [&](bool pairs) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
          load_a_pairs(ahead[step], p, call.query.stride_n, 16 * step, rows, call.query.width,
                       pairs, lane);
      };
      if (call.query.vectors && call.query.width % 2 == 0) {
        fetch(true);
      } else {
        fetch(false);
      }
    }
  };
  auto fetch_bases = [&](int first) {
    const T* p_key = call.key.at(lead) + first * call.key.stride_n;
    const T* p_value = call.value.at(lead) + first * call.value.stride_n;
    const float* p_bias = call.bias.p == nullptr ? nullptr : call.bias.at(lead);
    const int left = call.bases - first;
    for (int row = 0; row < args.resident; row += PART) {
      load_rows<PART, WIDTH>(
          b_key + row * PITCH, p_key + row * call.key.stride_n, call.key.stride_n, left - row,
          call.key.width, call.key.vectors, thread, LARGEST_BLOCK);
      load_rows<PART, WIDTH>(
          b_value + row * PITCH, p_value + row * call.value.stride_n, call.value.stride_n,
          left - row, call.value.width, call.value.vectors, thread, LARGEST_BLOCK);
    }
    for (int k = thread; k < args.resident; k += LARGEST_BLOCK)
      b_bias[k] = k >= left           ? -INF
                  : p_bias == nullptr ? 0.0f
                                      : in_base_2(p_bias[(first + k) * call.bias.stride_n]);
  };
  const float scale = call.scale * LOG2E;
  const bool whole = call.bases <= args.resident;
  const int64_t tiles = ceil_div<int64_t>(call.n, Shape::QUERIES);
  if (whole) fetch_bases(0);
  int64_t start = static_cast<int64_t>(blockIdx.y) * Shape::QUERIES + warp * ROWS;
  fetch_query(start);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    copy_wait<0>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if constexpr (STAGED) {
        load_a<PITCH>(q[step], b_query + 16 * step, lane);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) q[step][i] = ahead[step][i];
      }
    }
    __syncwarp();
    const int64_t next = start + static_cast<int64_t>(gridDim.y) * Shape::QUERIES;
    if (tile + gridDim.y < tiles) fetch_query(next);
    copy_commit();
    // C fragments of [ROWS, WIDTH]; rows lane / 4 and lane / 4 + 8
    float b_out[2 * STEPS][4] = {};
    float largest[2] = {-INF, -INF}, total[2] = {0.0f, 0.0f};
    for (int first = 0; first < call.bases; first += args.resident) {
      if (!whole) {
        __syncthreads();
        fetch_bases(first);
        copy_commit();
        copy_wait<0>();
        __syncthreads();
      }
      const int count = smaller(args.resident, call.bases - first);
      for (int part = 0; part < count; part += PART) {
        // C fragments of [ROWS, PART]
        float b_s[N_TILES][4] = {};
        const T* b_k = b_key + part * PITCH;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
          for (int i = 0; i < N_TILES; i += 2) {
            uint32_t b[4];
            load_b_by_column<PITCH>(b, b_k + 8 * i * PITCH + 16 * step, lane);
            mma<T>(b_s[i], q[step], b[0], b[1]);
            mma<T>(b_s[i + 1], q[step], b[2], b[3]);
          }
        float highest[2] = {largest[0], largest[1]};
#pragma unroll
        for (int i = 0; i < N_TILES; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float bias = b_bias[part + 8 * i + lane % 4 * 2 + c % 2];
            b_s[i][c] = fmaf(b_s[i][c], scale, bias);
            highest[c / 2] = fmaxf(highest[c / 2], b_s[i][c]);
          }
        float shift[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          highest[row] = largest_over_columns(highest[row]);
          // -inf - -inf is NaN; bases that are all excluded so far are to count for 0.
          shift[row] = highest[row] == -INF ? 0.0f : highest[row];
          const float rescale = exp2_fast(largest[row] - shift[row]);
          largest[row] = highest[row];
          total[row] *= rescale;
#pragma unroll
          for (int j = 0; j < 2 * STEPS; ++j) {
            b_out[j][2 * row] *= rescale;
            b_out[j][2 * row + 1] *= rescale;
          }
        }
#pragma unroll
        for (int i = 0; i < N_TILES; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            b_s[i][c] = exp2_fast(b_s[i][c] - shift[c / 2]);
            total[c / 2] += b_s[i][c];
          }
        const T* b_v = b_value + part * PITCH;
#pragma unroll
        for (int i = 0; i < N_TILES; i += 2) {
          const uint32_t a[4] = {
              pack<T>(b_s[i][0], b_s[i][1]), pack<T>(b_s[i][2], b_s[i][3]),
              pack<T>(b_s[i + 1][0], b_s[i + 1][1]), pack<T>(b_s[i + 1][2], b_s[i + 1][3])};
#pragma unroll
          for (int j = 0; j < 2 * STEPS; j += 2) {
            uint32_t b[4];
            load_b_by_row<PITCH>(b, b_v + 8 * i * PITCH + 8 * j, lane);
            mma<T>(b_out[j], a, b[0], b[1]);
            mma<T>(b_out[j + 1], a, b[2], b[3]);
          }
        }
      }
    }
    const int width = call.value.width;
    const int64_t batch = lead / call.query.heads, head = lead % call.query.heads;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = sum_over_columns(total[row]);
      const int64_t n = start + 8 * row + lane / 4;
      if (n >= call.n) continue;
      const float part = call.shares.of(lead, n), share = part / sum;
      T* p_out = call.p_out + ((batch * call.n + n) * call.query.heads + head) * width;
#pragma unroll
      for (int j = 0; j < 2 * STEPS; ++j) {
        const int channel = 8 * j + lane % 4 * 2;
        // 0 times NaN would be NaN.
        float low = part == 0.0f ? 0.0f : b_out[j][2 * row] * share;
        float high = part == 0.0f ? 0.0f : b_out[j][2 * row + 1] * share;
        if (call.add) {
          if (channel < width) low += widen(p_out[channel]);
          if (channel + 1 < width) high += widen(p_out[channel + 1]);
        }
        if (width % 2 == 0) {  // then every pair is aligned
          if (channel < width)
            *reinterpret_cast<uint32_t*>(p_out + channel) = pack<T>(low, high);
        } else {
          if (channel < width) p_out[channel] = narrow<T>(low);
          if (channel + 1 < width) p_out[channel + 1] = narrow<T>(high);
        }
      }
    }
    start = next;
  }
}

template <typename T, int STEPS>
__global__ void __launch_bounds__(LARGEST_BLOCK, STEPS > 5 ? 1 : 2)
    attention_kernel(const AttentionArgs<T> args) {
  attend<T, STEPS, true>(args);
}

// Queries go straight to registers, which leaves room in shared memory for more bases.
template <typename T, int STEPS>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) attention_direct_kernel(
    const AttentionArgs<T> args) {
  attend<T, STEPS, false>(args);
}

template <typename T, int STEPS, bool STAGED>
void launch_attention(const Context& context, const AttentionCall<T>& call) {
  using Shape = AttentionShape<STEPS, STAGED>;
  const int resident = Shape::resident(call.bases, context.shared_limit);
  const int64_t tiles = ceil_div<int64_t>(call.n, Shape::QUERIES);
  const int64_t blocks = smaller(tiles, larger<int64_t>(1, 2 * context.programs() / call.leads));
  const dim3 grid(static_cast<unsigned>(call.leads), static_cast<unsigned>(blocks));
  const AttentionArgs<T> args{call, resident};
  if constexpr (STAGED) {
    launch("attention_kernel", attention_kernel<T, STEPS>, grid, LARGEST_BLOCK,
           Shape::shared(resident), context, args);
  } else {
    launch("attention_direct_kernel", attention_direct_kernel<T, STEPS>, grid, LARGEST_BLOCK,
           Shape::shared(resident), context, args);
  }
}

template <typename T>
void float32_attention(const Context& context, const AttentionCall<T>& call) {
  static_assert(std::is_same_v<T, float>);
  const Chunk chunk =
      chunk_of(context.chunk_bytes, call.bases * int64_t{4}, call.leads, call.n, ProductShape::M);
  float* p_z = context.make<float>(chunk.leads * chunk.tokens * call.bases);
  const int64_t stride_z = chunk.tokens * call.bases;
  const View<float> z = view<float>(p_z, stride_z, 0, call.bases, 1, call.bases);
  const int heads = call.query.heads, width = call.value.width;
  const int64_t row = static_cast<int64_t>(heads) * width;
  const View<float> out = view<float>(call.p_out, call.n * row, width, row, heads, width);
  for (int64_t lead = 0; lead < call.leads; lead += chunk.leads)
    for (int64_t first = 0; first < call.n; first += chunk.tokens) {
      const int64_t leads = smaller(chunk.leads, call.leads - lead);
      const int64_t count = smaller(chunk.tokens, call.n - first);
      launch_product<false, false>(
          context,
          {call.query.from(lead, first), call.key.from(lead, 0), z, p_z, nullptr, count,
           call.query.width, call.query.width, 0, 0, call.bases, false},
          leads, 1);
      launch_softmax<T>(context, {p_z, call.bias.from(lead, 0), leads, count, stride_z, call.bases,
                                  call.scale * LOG2E, call.shares.from(lead, first)});
      launch_product<false, true>(
          context,
          {z, call.value.from(lead, 0), out.from(lead, 0), call.p_out + first * row, nullptr, count,
           call.bases, call.bases, 0, 0, width, call.add},
          leads, 1);
    }
}

template <typename T>
void basis_attention(const Context& context, const AttentionCall<T>& call) {
  if (call.leads == 0 || call.n == 0 || call.value.width == 0) return;
  if constexpr (std::is_same_v<T, float>) {
    float32_attention(context, call);
  } else {
    const int widest = larger(call.query.width, call.value.width);
    if (widest <= 48) return launch_attention<T, 3, true>(context, call);
    if (widest <= 64) return launch_attention<T, 4, true>(context, call);
    if (widest <= 80) {
      const int limit = context.shared_limit;
      const bool fits = AttentionShape<5>::resident(call.bases, limit) >= call.bases;
      // Where all of a head's bases then stay: they would come anew for each tile of queries.
      if (!fits && AttentionShape<5, false>::resident(call.bases, limit) >= call.bases)
        return launch_attention<T, 5, false>(context, call);
      return launch_attention<T, 5, true>(context, call);
    }
    launch_attention<T, 10, true>(context, call);
  }
}

// What both maps give is blended in p_out: the first writes its share, the second adds its own.
// Both in one kernel would take twice the registers, or each map's logits twice.
template <typename T>
void blended_attention(
    const Context& context, AttentionCall<T> target, const View<T>& query_source,
    const View<T>& key_source, const float* p_mask, int64_t mask_stride) {
  target.shares = {p_mask, mask_stride, target.query.heads, false};
  basis_attention(context, target);
  AttentionCall<T> source = target;
  source.query = query_source;
  source.key = key_source;
  source.shares.rest = true;
  source.add = true;
  basis_attention(context, source);
}

}  // namespace stem
