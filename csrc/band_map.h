// The padded input rows that a band (conv_bands.h) reads, in scratch memory that stays in the core's cache, in words
// (direct_words.h). Nothing here is called but from a function compiled for DEN_KERNELS_TARGET.
#pragma once

#include <cstring>

#include "conv_bands.h"
#include "direct_strips.h"
#include "direct_words.h"

namespace den_kernels {
namespace {

template <class T>
struct BandMap {
  int64_t rows, columns, pixel;
  BandMap(const ConvArguments<T>& p, const Band& band, int64_t words)
      : rows((band.rows - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1),
        columns(std::max(p.W + p.padding[1], (strip_columns(p.Wo) - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1)),
        pixel(spread(words)) {}
  int64_t size() const { return rows * columns * pixel; }
  void tap_offsets(const ConvArguments<T>& p, int64_t* taps) const {
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0, S = p.tap_columns(); s < S; ++s)
        taps[r * S + s] = (r * p.dilation[0] * columns + s * p.dilation[1]) * pixel;
  }
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// Asks for the selected channels of a pixel that will be copied: a row is often a page, which the processor's own
// prefetching does not cross.
template <class T>
KERNEL void prefetch_pixel(const T* from, const Channels& inputs) {
  for (const Range& range : inputs.ranges)
    for (int64_t k = 0; k < range.width; k += 16 * per_word<T>)
      _mm_prefetch(reinterpret_cast<const char*>(from + range.first + k), _MM_HINT_T0);
}

// The channels of one pixel: the words that hold selected ones, what else they hold set to zero.
template <class T>
KERNEL void copy_pixel(const T* from, const Channels& inputs, const Channels& words, float* to) {
  if constexpr (per_word<T> == 1) {
    for (const Range& range : inputs.ranges) {
      for (int64_t k = 0; k < range.width; k += 16) {
        const Lanes lanes = lanes_of(range.width - k);
        store16(to + k, load16(from + range.first + k, lanes), lanes);
      }
      to += range.width;
    }
  } else {
    for (size_t i = 0; i < inputs.blocks.size(); ++i) {
      const Block& block = inputs.blocks[i];
      const Vector value = load16(from + block.index * 16, static_cast<Lanes>(block.lanes));
      store_words<T>(to + words.blocks[i].place, value, block.lanes, words.blocks[i].lanes);
    }
  }
}

// Instance j's input rows, zeros around them, only the channels in use; unless `all`, of a kernel of one row or column
// only what its stride reads.
template <class T>
void copy_rows(const ConvArguments<T>& p, const Band& band, const Channels& words, const BandMap<T>& map, int64_t j,
               float* scratch, bool all = false) {
  const T* x = p.x + p.route.order[band.start + j] * p.H * p.W * p.C;
  const int64_t down = p.R > 1 || all ? 1 : p.stride[0], right_by = p.S > 1 || all ? 1 : p.stride[1];
  const int64_t first = (right_by - p.padding[1] % right_by) % right_by;
  const bool whole = band.inputs.count == p.C && right_by == 1;
  for (int64_t r = 0; r < map.rows; r += down) {
    const int64_t row = band.first_row * p.stride[0] - p.padding[0] + r;
    float* to = scratch + r * map.columns * map.pixel;
    if (row < 0 || row >= p.H) {
      std::memset(to, 0, map.columns * map.pixel * sizeof(float));
      continue;
    }
    const int64_t right = p.padding[1] + p.W;
    std::memset(to, 0, p.padding[1] * map.pixel * sizeof(float));
    std::memset(to + right * map.pixel, 0, (map.columns - right) * map.pixel * sizeof(float));
    const T* from = x + row * p.W * p.C;
    to += p.padding[1] * map.pixel;
    if (whole && map.pixel * per_word<T> == p.C)
      std::memcpy(to, from, p.W * p.C * sizeof(T));
    else
      for (int64_t c = first; c < p.W; c += right_by) {
        if (row + down < p.H) prefetch_pixel(from + (down * p.W + c) * p.C, band.inputs);
        copy_pixel(from + c * p.C, band.inputs, words, to + c * map.pixel);
      }
  }
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
