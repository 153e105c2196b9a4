// The padded input rows that a band (conv_bands.h) reads, in scratch memory that stays in the core's cache; float32,
// nothing here is called but from a function compiled for AVX-512.
#pragma once

#include <cstring>

#include "conv_bands.h"

namespace den_kernels {

using Problem = ConvProblem<float>;

struct BandMap {
  int64_t rows, columns, pixel;
  BandMap(const Problem& p, const Band& band)
      : rows((band.rows - 1) * p.stride[0] + (p.R - 1) * p.dilation[0] + 1),
        columns(std::max(p.W + p.padding[1], (round_up(p.Wo, 4) - 1) * p.stride[1] + (p.S - 1) * p.dilation[1] + 1)),
        pixel(band.inputs.count) {}
  int64_t size() const { return rows * columns * pixel; }
  void tap_offsets(const Problem& p, int64_t* taps) const {
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s) taps[r * p.S + s] = (r * p.dilation[0] * columns + s * p.dilation[1]) * pixel;
  }
};

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")

// Instance j's input rows, zeros around them, only the channels in use.
inline void copy_rows(const Problem& p, const Band& band, const BandMap& map, int64_t j, float* scratch) {
  const float* x = p.x + p.route.order[band.start + j] * p.H * p.W * p.C;
  for (int64_t r = 0; r < map.rows; ++r) {
    const int64_t row = band.first_row * p.stride[0] - p.padding[0] + r;
    float* to = scratch + r * map.columns * map.pixel;
    if (row < 0 || row >= p.H) {
      std::memset(to, 0, map.columns * map.pixel * sizeof(float));
      continue;
    }
    const int64_t right = p.padding[1] + p.W;
    std::memset(to, 0, p.padding[1] * map.pixel * sizeof(float));
    std::memset(to + right * map.pixel, 0, (map.columns - right) * map.pixel * sizeof(float));
    const float* from = x + row * p.W * p.C;
    to += p.padding[1] * map.pixel;
    if (map.pixel == p.C) {
      std::memcpy(to, from, p.W * p.C * sizeof(float));
      continue;
    }
    for (const Run& run : band.inputs.runs) {
      for (int64_t c = 0; c < p.W; ++c)
        for (int64_t k = 0; k < run.width; ++k) to[c * map.pixel + k] = from[c * p.C + run.first + k];
      to += run.width;
    }
  }
}

#pragma GCC pop_options

}  // namespace den_kernels
