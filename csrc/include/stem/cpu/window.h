// Attention of a video's tokens to a window of places in all frames, exactly, and to bases of all
// tokens for the rest. One softmax goes over both, and over the keys of a text.
//
// The queries of a place see the same keys, so they are the lanes: kPanel frames at a time, as in
// partial.h, with keys and values laid out by place, where a window's row is one run of rows. Per
// (query, key) pair: 2 * (width + value_width + 2) FLOPs, one exponential.
//
// A base counts with those of its tokens that are not in the window: its row of sums loses the
// window's tokens for each place, which is value_width of the 2 * frames * (width + value_width)
// FLOPs that attention to such a token takes, and the touched rows are copied anew after it.
// Values have two columns more: what a row weighs in the softmax's sum, and what of it is a base's.
#pragma once

#include "partial.h"

namespace stem::cpu::STEM_ISA {

// How many places to each side the round window reaches, `down` rows above or below its centre.
STEM_INLINE int64_t window_reach(const WindowSizes& sizes, int64_t down) {
  const int64_t left = sizes.window * (sizes.window + 1) - down * down;
  int64_t reach = 0;
  while (reach < sizes.columns - 1 && (reach + 1) * (reach + 1) <= left) ++reach;
  return reach;
}

// Calls `visit` with the first token and the number of tokens of each row of a place's window.
template <typename Visit>
STEM_INLINE void each_window_row(const WindowSizes& sizes, int64_t place, const Visit& visit) {
  const int64_t y = place / sizes.columns, x = place % sizes.columns;
  for (int64_t row = y > sizes.window ? y - sizes.window : 0;
       row < sizes.rows && row - y <= sizes.window; ++row) {
    const int64_t reach = window_reach(sizes, row - y);
    const int64_t first = x > reach ? x - reach : 0;
    const int64_t last = smaller(x + reach + 1, sizes.columns);
    visit((row * sizes.columns + first) * sizes.frames, (last - first) * sizes.frames);
  }
}

// Tokens of places first ... last - 1, of one head: keys [places, frames, width], values [places,
// frames, value_columns], numbers [places, frames] of assignment [frames, places], where given.
static void place_tokens(const WindowSizes& sizes, const Rows& key, const Rows& value,
                         const int32_t* assignment, int64_t first, int64_t last, float* keys,
                         float* values, int32_t* numbers) {
  const int64_t columns = sizes.value_columns();
  for (int64_t place = first; place < last; ++place)
    for (int64_t frame = 0; frame < sizes.frames; ++frame) {
      const int64_t from = frame * sizes.places() + place, to = place * sizes.frames + frame;
      float* row = values + to * columns;
      load_row(key, from, sizes.width, keys + to * sizes.width);
      load_row(value, from, sizes.value_width, row);
      row[sizes.value_width] = 1.0f;
      row[sizes.value_width + 1] = 0.0f;
      if (assignment) numbers[to] = assignment[from];
    }
}

static int64_t window_scratch(const WindowSizes& sizes) {
  const int64_t columns = sizes.value_columns();
  return sizes.bases * (columns + 2) + kPanel * (sizes.width + 2 + columns + kKeys) +
         kPanel * (sizes.width > columns ? sizes.width : columns) + kPanel * sizes.value_width;
}

// One panel of a place's queries while its keys pass by.
struct WindowPanel {
  const WindowSizes& sizes;
  float* queries;  // [width, kPanel]
  float* logits;   // [kKeys, kPanel]
  float* state;    // [2 + value_columns, kPanel]: largest logit, unused, sums

  // bias [count], in base 2, or null. kLeft: of the left half's queries alone.
  template <bool kLeft>
  void attend(const float* keys, const float* values, const float* bias, int64_t count) const {
    const int64_t width = sizes.width, columns = sizes.value_columns();
    for (int64_t begin = 0; begin < count; begin += kKeys) {
      const int64_t some = smaller(kKeys, count - begin);
      multiply_strided<kLeft>(some, width, keys + begin * width, width, queries, logits, false);
      for (int64_t key = 0; bias && key < some; ++key)
        for (int64_t lane = 0; lane < kPanel; ++lane)
          logits[key * kPanel + lane] += bias[begin + key];
      weigh_keys(some, columns, kLeft ? kLanes : kPanel, logits, state);
      multiply_transposed<kLeft>(columns, some, values + begin * columns, columns, logits,
                                 state + 2 * kPanel, true);
    }
  }

  template <bool kLeft>
  void attend_to_all(const WindowOperands& operands, const float* base_sums, int64_t place) const {
    const int64_t width = sizes.width, columns = sizes.value_columns();
    each_window_row(sizes, place, [&](int64_t first, int64_t tokens) {
      attend<kLeft>(operands.keys + first * width, operands.values + first * columns, nullptr,
                    tokens);
    });
    attend<kLeft>(operands.base_keys, base_sums, operands.base_bias, sizes.bases);
    attend<kLeft>(operands.text_keys, operands.text_values, operands.text_bias, sizes.texts);
  }
};

// The bases' sums without the tokens of a place's window; the touched bases' numbers, and how many.
static int64_t leave_window_out(const WindowSizes& sizes, const WindowOperands& operands,
                                int64_t place, float* sums, int32_t* stamps, int32_t* touched) {
  const int64_t columns = sizes.value_columns();
  int64_t count = 0;
  each_window_row(sizes, place, [&](int64_t first, int64_t tokens) {
    for (int64_t token = first; token < first + tokens; ++token) {
      const int32_t base = operands.numbers[token];
      const float* value = operands.values + token * columns;
      float* row = sums + base * columns;
      if (stamps[base] != place) {
        stamps[base] = static_cast<int32_t>(place);
        touched[count++] = base;
      }
      for (int64_t i = 0; i < sizes.value_width; ++i) row[i] -= value[i];
      row[sizes.value_width] -= 1.0f;
      row[sizes.value_width + 1] -= 1.0f;
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    float* row = sums + touched[i] * columns;
    for (int64_t column = 0; row[sizes.value_width] == 0.0f && column < sizes.value_width; ++column)
      row[column] = 0.0f;  // and not what rounding left
  }
  return count;
}

// Queries of places first ... last - 1, of one head -> rows of out; peaks and masses, of every
// token the largest logit in base 2 and the sum of the weights, where given.
static void window_attention(const WindowSizes& sizes, const WindowOperands& operands,
                             const Rows& query, float scale, int64_t first, int64_t last, DType to,
                             void* out, int64_t out_stride, float* peaks, float* masses,
                             float* scratch) {
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
  const int64_t width = sizes.width, value_width = sizes.value_width;
  const int64_t columns = sizes.value_columns(), frames = sizes.frames;
  const int64_t rows = 2 + columns;
  auto take = [&](int64_t count) { return (scratch += count) - count; };
  float* sums = take(sizes.bases * columns);
  int32_t* stamps = reinterpret_cast<int32_t*>(take(sizes.bases));
  int32_t* touched = reinterpret_cast<int32_t*>(take(sizes.bases));
  const WindowPanel panel{sizes, take(width * kPanel), take(kKeys * kPanel), take(rows * kPanel)};
  float* by_token = take(kPanel * (width > columns ? width : columns));
  float* added = take(value_width * kPanel);
  for (int64_t i = 0; i < sizes.bases * columns; ++i) sums[i] = operands.base_sums[i];
  for (int64_t base = 0; base < sizes.bases; ++base) stamps[base] = -1;
  for (int64_t place = first; place < last; ++place) {
    const int64_t changed =
        sizes.bases > 0 ? leave_window_out(sizes, operands, place, sums, stamps, touched) : 0;
    for (int64_t begin = 0; begin < frames; begin += kPanel) {
      const int64_t count = smaller(kPanel, frames - begin);
      const auto token = [&](int64_t i) { return (begin + i) * sizes.places() + place; };
      for (int64_t i = 0; i < width * kPanel; ++i) panel.queries[i] = 0.0f;
      for (int64_t i = 0; i < count; ++i) load_row(query, token(i), width, by_token + i * width);
      transpose(by_token, width, count, width, panel.queries, kPanel);
      for (int64_t i = 0; i < width * kPanel; ++i) panel.queries[i] *= scale * kLog2E;
      for (int64_t i = 0; i < rows * kPanel; ++i)
        panel.state[i] = i < kPanel ? -__builtin_inff() : 0.0f;
      if (count <= kLanes)
        panel.attend_to_all<true>(operands, sums, place);
      else
        panel.attend_to_all<false>(operands, sums, place);
      float* outputs = panel.state + 2 * kPanel;
      const float* mass = outputs + value_width * kPanel;
      if (operands.matrix)
        multiply_transposed(value_width, width, operands.matrix, value_width, panel.queries, added,
                            false);
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const Vec inverse = 1.0f / load(mass + lane), of_bases = kLn2 * load(mass + kPanel + lane);
        for (int64_t i = 0; i < value_width; ++i) {
          float* sum = outputs + i * kPanel + lane;
          const Vec total =
              operands.matrix ? load(sum) + of_bases * load(added + i * kPanel + lane) : load(sum);
          store(sum, total * inverse);
        }
      }
      transpose(outputs, kPanel, value_width, count, by_token, value_width);
      for (int64_t i = 0; i < count; ++i) {
        store_row(by_token + i * value_width, value_width, to, out, token(i) * out_stride);
        if (peaks) {
          peaks[token(i)] = panel.state[i];
          masses[token(i)] = mass[i];
        }
      }
    }
    for (int64_t i = 0; i < changed; ++i)
      for (int64_t column = 0; column < columns; ++column)
        sums[touched[i] * columns + column] = operands.base_sums[touched[i] * columns + column];
  }
}

}  // namespace stem::cpu::STEM_ISA
