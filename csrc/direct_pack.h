// Weights of a convolution packed for the direct kernels (dynamic_residual.h): of bfloat16 in words of two neighbouring
// inputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "direct_words.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// 16 words of inputs, of which `left` inputs are left, of `outputs` outputs of a tap, `step` values from one to the
// next, times their scale.
template <class T>
void pack_tile(const T* from, int64_t step, int64_t outputs, int64_t left, const float* scale, float* to) {
  Vector tile[16];
  UNROLL for (int q = 0; q < 16; ++q) {
    tile[q] = q < outputs ? load_words(from + q * step, left) : zeros();
    if (scale && q < outputs) tile[q] = scale_words<T>(tile[q], scale[q]);
  }
  transpose16(tile);
  UNROLL for (int k = 0; k < 16; ++k) store16(to + k * 16, tile[k]);
}

// 16 words of a tap's outputs, of which `left` outputs are left, `step` values from one to the next, for 16 inputs, of
// which `inputs_left` are left: the inputs and outputs of the transposed convolution.
template <class T>
void pack_turned_tile(const T* from, int64_t step, int64_t left, int64_t inputs_left, float* to) {
  const Lanes inputs = lanes_of(inputs_left), none = 0;
  for (int64_t q = 0; q < 16; ++q, left -= per_word<T>) {
    const T* word = from + q * per_word<T> * step;
    store16(to + q * 16, load_word<T>(word, left > 0 ? inputs : none, step, left > 1 ? inputs : none));
  }
}

#pragma GCC pop_options

// [ceil(O / 16)][ceil(I / 16 words)][tap][16 words of I][16 of O], zeros beyond O and I.
template <class T>
void run_pack(const T* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  constexpr int64_t width = 16 * per_word<T>;
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + width - 1) / width;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t o = 0; o < O_blocks; ++o)
    for (int64_t i = 0; i < I_blocks; ++i)
      for (int64_t t = 0; t < taps; ++t)
        pack_tile(weight + (o * 16 * taps + t) * I + i * width, taps * I, O - o * 16, I - i * width,
                  scale ? scale + o * 16 : scale, packed + ((o * I_blocks + i) * taps + t) * 256);
}

// run_pack of the transposed convolution's weights, [I, taps, O] with the last tap first.
template <class T>
void run_pack_turned(const T* weight, float* packed, int64_t O, int64_t taps, int64_t I) {
  constexpr int64_t width = 16 * per_word<T>;
  const int64_t O_blocks = (O + width - 1) / width, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t i = 0; i < I_blocks; ++i)
    for (int64_t o = 0; o < O_blocks; ++o)
      for (int64_t t = 0; t < taps; ++t)
        pack_turned_tile(weight + (o * width * taps + taps - 1 - t) * I + i * 16, taps * I, O - o * width, I - i * 16,
                         packed + ((i * O_blocks + o) * taps + t) * 256);
}

}  // namespace
}  // namespace den_kernels
