// Inner loop of a direct convolution with AMX: bfloat16 products summed in float32 tiles of up to 16 pixels x 16 output
// channels. Nothing here is called but from a function compiled for it, on a thread that configured its tiles.
#pragma once

#include <cstdint>
#include <vector>

#include "amx_config.h"
#include "direct_channels.h"
#include "numbers.h"

namespace den_kernels {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// sums[i][row][o] = sum over blocks and taps of pixels[i][block][tap][row] * weight[o / 16][block][tap], where i is one
// of 4 / outputs tiles of pixels and o one of `outputs` * 16 channels. pixel: bytes from a tile's row to the next.
template <int outputs>
KERNEL void sum_tiles(float* sums, const bf16* const (&pixels)[4], int64_t pixel, const std::vector<Block>& blocks,
                      int64_t plane, const int64_t* taps, int64_t tap_count, const bf16* weights, int64_t weight_tile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t place = 0;
  for (const Block& block : blocks) {
    const bf16* weight = weights + block.index * tap_count * 512;
    for (int64_t t = 0; t < tap_count; ++t, weight += 512) {
      const int64_t at = place + taps[t];
      _tile_loadd(6, weight, 64);
      if constexpr (outputs == 2) {
        _tile_loadd(4, pixels[0] + at, pixel);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weight + weight_tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, pixels[1] + at, pixel);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_loadd(4, pixels[0] + at, pixel);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, pixels[1] + at, pixel);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, pixels[2] + at, pixel);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, pixels[3] + at, pixel);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    place += plane;
  }
  if constexpr (outputs == 2) {
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
  } else {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// 32 values of bfloat16 as two vectors of float32, and back (to nearest even).
struct Pair {
  __m512 low, high;
};
KERNEL __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
KERNEL Pair widen(__m512i v) { return {widen(_mm512_castsi512_si256(v)), widen(_mm512_extracti64x4_epi64(v, 1))}; }
KERNEL __m256i rounded(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
KERNEL __m512i rounded(const Pair& v) { return (__m512i)_mm512_cvtne2ps_pbh(v.high, v.low); }

#pragma GCC pop_options

}  // namespace den_kernels
