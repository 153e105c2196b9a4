// The inputs that a band (conv_bands.h) of a weight gradient reads, in scratch memory that stays in the core's cache.
// They lie in words that meet those of the output's gradient (direct_gradient.h), one for every channel in use of every
// column:
//   float32    the input (band_map.h)
//   bfloat16   the inputs of two neighbouring output pixels: of this column, and of `stride` columns on
// A tap is then a shift by whole columns in both, though in bfloat16 it splits the pairs that another tap reads: each
// input lies there twice, in as many bytes as float32 takes. The last pixel of an odd row has no neighbour. Columns of
// its own, behind the others, hold what it reads, beside zeros: what it does not read may be infinite.
#pragma once

#include <cstring>

#include "band_map.h"

namespace den_kernels {
namespace {

template <class T>
struct GradientMap : BandMap<T> {
  int64_t alone;  // the first column of the pixel without a neighbour
  GradientMap(const ConvArguments<T>& p, const Band& band)
      : BandMap<T>(p, band, band.inputs.count), alone(BandMap<T>::columns) {
    if (p.Wo % per_word<T>) this->columns += (p.S - 1) * p.dilation[1] + 1;
  }
  // The column that word `word` of a row of output pixels reads through its first tap.
  int64_t column(const ConvArguments<T>& p, int64_t word) const {
    return (word + 1) * per_word<T> > p.Wo ? alone : word * per_word<T> * p.stride[1];
  }
};

// The words of a row of output pixels.
template <class T>
int64_t words_of_row(const ConvArguments<T>& p) {
  return (p.Wo + per_word<T> - 1) / per_word<T>;
}

#pragma GCC push_options
DEN_KERNELS_TARGET

// The words of input column c of a row, beside what lies `step` columns on; `step` 0: beside zeros.
template <class T>
KERNEL void copy_words(const ConvArguments<T>& p, const T* row, int64_t c, int64_t step, const Channels& inputs,
                       float* to) {
  const bool first = c >= 0 && c < p.W, second = step && c + step >= 0 && c + step < p.W;
  for (const Range& range : inputs.ranges) {
    for (int64_t k = 0; k < range.width; k += 16) {
      const Lanes lanes = lanes_of(range.width - k), none = 0;
      const T* from = row + c * p.C + range.first + k;
      store16(to + k, load_word<T>(from, first ? lanes : none, step * p.C, second ? lanes : none), lanes);
    }
    to += range.width;
  }
}

// Instance j's inputs, zeros around them, only the channels in use.
template <class T>
void copy_inputs(const ConvArguments<T>& p, const Band& band, const GradientMap<T>& map, int64_t j, float* to) {
  if constexpr (per_word<T> == 1) return copy_rows(p, band, band.inputs, map, j, to, true);
  const T* x = p.x + p.route.order[band.start + j] * p.H * p.W * p.C;
  const int64_t last = (p.Wo - 1) * p.stride[1];  // column of the last pixel's first tap
  for (int64_t r = 0; r < map.rows; ++r) {
    const int64_t row = band.first_row * p.stride[0] - p.padding[0] + r;
    if (row < 0 || row >= p.H) {
      std::memset(to, 0, map.columns * map.pixel * sizeof(float));
      to += map.columns * map.pixel;
      continue;
    }
    for (int64_t c = 0; c < map.columns; ++c, to += map.pixel) {
      const bool paired = c < map.alone;
      const int64_t column = paired ? c : last + c - map.alone;
      if (row + 1 < p.H && c < p.W) prefetch_pixel(x + ((row + 1) * p.W + c) * p.C, band.inputs);
      copy_words(p, x + row * p.W * p.C, column - p.padding[1], paired ? p.stride[1] : 0, band.inputs, to);
    }
  }
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
