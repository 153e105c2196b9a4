// Rows of a depthwise convolution, a vector of 16 channels of a few pixels at a time.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "direct_activation.h"
#include "direct_chunks.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// One row of a plane through conv2: rows[r] is where tap row r of the first pixel begins, begin .. end those on the
// map.
struct DepthwiseRow {
  const float* rows[max_taps];
  int64_t begin, end, S, step;  // floats from a pixel to the next
  const float* weight;          // [R, S, 16]
  Vector bias;
  Bounds bounds;
};

template <int pixels>
void sum_depthwise(const DepthwiseRow& row, int64_t first, float* to) {
  Vector acc[pixels];
  UNROLL for (int i = 0; i < pixels; ++i) acc[i] = row.bias;
  for (int64_t r = row.begin; r < row.end; ++r) {
    const float *in = row.rows[r] + first * row.step, *w = row.weight + r * row.S * 16;
    for (int64_t s = 0; s < row.S; ++s, in += 16, w += 16) {
      const Vector weights = load16(w);
      UNROLL for (int i = 0; i < pixels; ++i) acc[i] = fma(load16(in + i * row.step), weights, acc[i]);
    }
  }
  UNROLL for (int i = 0; i < pixels; ++i) store16(to + i * 16, bound(row.bounds, acc[i]));
}

template <int... fewer>
constexpr auto depthwise_by_pixels(std::integer_sequence<int, fewer...>) {
  return std::array{&sum_depthwise<fewer + 1>...};
}

// The sums of a row of `count` pixels.
void depthwise_row(const DepthwiseRow& row, int64_t count, float* to) {
  static constexpr auto parts = depthwise_by_pixels(std::make_integer_sequence<int, depthwise_pixels>{});
  const int64_t number = (count + depthwise_pixels - 1) / depthwise_pixels;
  for (int64_t i = 0; i < number; ++i) {
    int64_t begin, end;
    share(count, i, number, begin, end);
    parts[end - begin - 1](row, begin, to + begin * 16);
  }
}

// The sum of `count` vectors that lie side by side.
void sum_row(const float* from, int64_t count, float* to) {
  Vector sum = zeros();
  for (int64_t i = 0; i < count; ++i) sum = add(sum, load16(from + i * 16));
  store16(to, sum);
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
