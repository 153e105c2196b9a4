// Weights of a convolution packed for the direct kernels (dynamic_residual.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "direct_words.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// 16 inputs of `outputs` outputs of a tap, `step` floats from one to the next, times their scale.
void pack_tile(const float* from, int64_t step, int64_t outputs, Lanes inputs, const float* scale, float* to) {
  Vector tile[16];
  UNROLL for (int q = 0; q < 16; ++q) {
    tile[q] = q < outputs ? load16(from + q * step, inputs) : zeros();
    if (scale && q < outputs) tile[q] = multiply(tile[q], broadcast(scale[q]));
  }
  transpose16(tile);
  UNROLL for (int k = 0; k < 16; ++k) store16(to + k * 16, tile[k]);
}

#pragma GCC pop_options

void run_pack(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t o = 0; o < O_blocks; ++o)
    for (int64_t i = 0; i < I_blocks; ++i)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t left = I - i * 16;
        const Lanes inputs = static_cast<Lanes>(left >= 16 ? 0xFFFF : (1u << left) - 1);
        pack_tile(weight + (o * 16 * taps + t) * I + i * 16, taps * I, O - o * 16, inputs,
                  scale ? scale + o * 16 : scale, packed + ((o * I_blocks + i) * taps + t) * 256);
      }
}

}  // namespace
}  // namespace den_kernels
