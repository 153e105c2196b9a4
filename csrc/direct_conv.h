// A band (conv_bands.h) copies the input rows that it reads, padded, into scratch memory that stays in the core's cache
// (band_map.h), convolves (direct_tiles.h) and writes its output rows whole, zeros included.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "band_map.h"
#include "direct_tiles.h"

namespace den_kernels {
namespace {

constexpr int quads_per_tile = 3;  // of four pixels: with two vectors of channels, 24 of 32 registers sum

#pragma GCC push_options
DEN_KERNELS_TARGET

struct Quad {
  int64_t row, column, live;
};
template <class T>
KERNEL Quad quad_at(const ConvProblem<T>& p, int64_t q) {
  const int64_t per_row = (p.Wo + 3) / 4, column = q % per_row * 4;
  return {q / per_row, column, p.Wo - column < 4 ? p.Wo - column : 4};
}

// The blocks of output channels block[0 .. vectors - 1] of quads from q0: the sums, and zeros in lanes not selected.
template <class T, int vectors, int quads>
void conv_tile(const ConvProblem<T>& p, const Channels& words, const BandMap<T>& map, const float* scratch, T* out,
               const Block* block, int64_t q0, const int64_t* taps, Ahead ahead) {
  const float* input[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(p, q0 + q);
    input[q] = scratch + (at.row * p.stride[0] * map.columns + at.column * p.stride[1]) * map.pixel;
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __mmask16 live = static_cast<__mmask16>(block[v].lanes);
    const __m512 bias = p.bias ? load16(p.bias + block[v].index * 16, live) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < quads * 4; ++i) acc[i][v] = bias;
  }
  const int64_t weight_vector = weight_words<T>(p.C, p.R * p.S);
  if (ahead.count) ahead.distance = (block[vectors].index - block[0].index) * weight_vector;
  sum_channels<T, vectors, quads, false>(
      acc, input, map.pixel * p.stride[1], 1, taps, p.R * p.S, words_of(p.weight) + block[0].index * weight_vector,
      (block[vectors - 1].index - block[0].index) * weight_vector, words.pieces, ahead);
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(p, q0 + q);
    T* to = out + (at.row * p.Wo + at.column) * p.C_out;
    UNROLL for (int i = 0; i < 4; ++i) {
      if (i >= at.live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        const __m512 sum = _mm512_maskz_mov_ps(static_cast<__mmask16>(block[v].lanes), acc[q * 4 + i][v]);
        store16(to + i * p.C_out + block[v].index * 16, sum, lanes_of(p.C_out - block[v].index * 16));
      }
    }
  }
}

// By how many vectors and quads they take, from one.
template <class T>
constexpr decltype(&conv_tile<T, 1, 1>) conv_tiles[2][3] = {
    {conv_tile<T, 1, 1>, conv_tile<T, 1, 2>, conv_tile<T, 1, 3>},
    {conv_tile<T, 2, 1>, conv_tile<T, 2, 2>, conv_tile<T, 2, 3>}};

template <class T>
void run_band(const ConvProblem<T>& p, const Band& band, const Channels& words, float* scratch) {
  const BandMap<T> map(p, band, words.count);
  int64_t taps[max_taps];
  map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count && map.pixel; ++j) copy_rows(p, band, words, map, j, scratch + j * map.size());

  const auto out_of = [&](int64_t j) {
    return p.out + (p.route.order[band.start + j] * p.Ho + band.first_row) * p.Wo * p.C_out;
  };
  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const int64_t quads = band.rows * ((p.Wo + 3) / 4), tiles = (quads + quads_per_tile - 1) / quads_per_tile;
  for (int64_t i = 0; i < block_count; i += 2) {
    const bool two = i + 1 < block_count;
    for (int64_t j = 0; j < band.count; ++j)
      for (int64_t q = 0; q < quads; q += quads_per_tile) {
        const auto run = conv_tiles<T>[two][std::min<int64_t>(quads_per_tile, quads - q) - 1];
        const int64_t tile = j * tiles + q / quads_per_tile;
        const Ahead ahead = i + 2 < block_count ? ahead_of(tile, band.count * tiles) : Ahead{};
        run(p, words, map, scratch + j * map.size(), out_of(j), &blocks[i], q, taps, ahead);
      }
  }
  for (const Run& gap : band.outputs.gaps)
    for (int64_t j = 0; j < band.count; ++j)
      for (int64_t i = 0; i < band.rows * p.Wo; ++i)
        std::memset(out_of(j) + i * p.C_out + gap.first, 0, gap.width * sizeof(T));
}

#pragma GCC pop_options

template <class T>
void run_direct(const ConvProblem<T>& p) {
  std::map<const Channels*, Channels> words;  // of what a segment reads
  const auto words_of_inputs = [&words](const Band& band) -> const Channels& {
    const auto found = words.find(&band.inputs);
    return found == words.end() ? words[&band.inputs] = in_words<T>(band.inputs) : found->second;
  };
  const auto bytes_of = [&](const Band& band) {
    return band.count * BandMap<T>(p, band, words_of_inputs(band).count).size() * 4;
  };
  run_bands(p, 16, 1, bytes_of, [&](const Band& band, void* scratch) {
    run_band(p, band, words_of_inputs(band), static_cast<float*>(scratch));
  });
}

}  // namespace
}  // namespace den_kernels
