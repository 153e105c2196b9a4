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

#pragma GCC push_options
DEN_KERNELS_TARGET

// A band in scratch memory.
template <class T>
struct Maps {
  const ConvProblem<T>& problem;
  const Band& band;
  const Channels& words;
  BandMap<T> map;
  const float* scratch;
};

// Output pixels of strip q of a band: instance, row of the band, first column, and how many of its pixels lie on the
// map. The rows of all instances lie together, so that a tile of the first row or the last leaves out the taps on
// padding.
struct Strip {
  int64_t instance, row, column, live;
};
template <class T>
KERNEL Strip strip_at(const Maps<T>& m, int64_t q) {
  const int64_t size = strip_size(m.problem.Wo), per_row = strips_of_row(m.problem.Wo);
  const int64_t line = q / per_row, column = (q - line * per_row) * size, row = line / m.band.count;
  return {line - row * m.band.count, row, column, std::min(size, m.problem.Wo - column)};
}

// The taps of strips q0 .. q0 + strips - 1.
template <class T>
KERNEL Taps taps_of(const Maps<T>& m, const int64_t* taps, int64_t q0, int strips) {
  const ConvProblem<T>& p = m.problem;
  const int64_t first = strip_at(m, q0).row, last = strip_at(m, q0 + strips - 1).row, top = m.band.first_row;
  return taps_on_map(taps, p.R, p.S, top + first, top + last, p.stride[0], p.dilation[0], p.padding[0],
                     p.padding[0] + p.H - 1);
}

// The blocks of output channels block[0 .. vectors - 1] of strips from q0: the sums, and zeros in lanes not selected.
template <class T, int vectors, int strips, int size>
void conv_tile(const Maps<T>& m, const Block* block, int64_t q0, const int64_t* taps, Ahead ahead) {
  const ConvProblem<T>& p = m.problem;
  const float* input[strips];
  T* out[strips];
  UNROLL for (int q = 0; q < strips; ++q) {
    const Strip at = strip_at(m, q0 + q);
    input[q] = m.scratch + at.instance * m.map.size() +
               (at.row * p.stride[0] * m.map.columns + at.column * p.stride[1]) * m.map.pixel;
    const int64_t row = p.route.order[m.band.start + at.instance] * p.Ho + m.band.first_row + at.row;
    out[q] = p.out + (row * p.Wo + at.column) * p.C_out;
    for (int64_t i = 0; i < at.live; ++i) {  // it comes from further out, and is there when the sums are
      UNROLL for (int v = 0; v < vectors; ++v) {
        _mm_prefetch(reinterpret_cast<const char*>(out[q] + i * p.C_out + block[v].index * 16), _MM_HINT_T1);
      }
    }
  }
  __m512 acc[strips * size][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __mmask16 live = static_cast<__mmask16>(block[v].lanes);
    const __m512 bias = p.bias ? load16(p.bias + block[v].index * 16, live) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < strips * size; ++i) acc[i][v] = bias;
  }
  const int64_t weight_vector = weight_words<T>(p.C, p.R * p.S);
  if (ahead.count) ahead.distance = (block[vectors].index - block[0].index) * weight_vector;
  sum_channels<T, vectors, strips, size, false>(acc, input, m.map.pixel * p.stride[1], 1, taps_of(m, taps, q0, strips),
                                                words_of(p.weight) + block[0].index * weight_vector,
                                                (block[vectors - 1].index - block[0].index) * weight_vector,
                                                m.words.pieces, ahead);
  UNROLL for (int q = 0; q < strips; ++q) {
    const int64_t live = strip_at(m, q0 + q).live;
    UNROLL for (int i = 0; i < size; ++i) {
      if (i >= live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        const __m512 sum = _mm512_maskz_mov_ps(static_cast<__mmask16>(block[v].lanes), acc[q * size + i][v]);
        store16(out[q] + i * p.C_out + block[v].index * 16, sum, lanes_of(p.C_out - block[v].index * 16));
      }
    }
  }
}

// By how many vectors and strips they take, from one.
template <class T>
using ConvTile = void (*)(const Maps<T>&, const Block*, int64_t q0, const int64_t* taps, Ahead);
template <class T>
constexpr ConvTile<T> fours[2][3] = {{conv_tile<T, 1, 1, 4>, conv_tile<T, 1, 2, 4>, conv_tile<T, 1, 3, 4>},
                                     {conv_tile<T, 2, 1, 4>, conv_tile<T, 2, 2, 4>, conv_tile<T, 2, 3, 4>}};
template <class T>
constexpr ConvTile<T> sevens[2][3] = {{conv_tile<T, 1, 1, 7>, conv_tile<T, 1, 2, 7>},
                                      {conv_tile<T, 2, 1, 7>, conv_tile<T, 2, 2, 7>}};

template <class T>
void run_band(const ConvProblem<T>& p, const Band& band, const Channels& words, float* scratch) {
  const Maps<T> maps{p, band, words, BandMap<T>(p, band, words.count), scratch};
  int64_t taps[max_taps];
  maps.map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count && words.count; ++j)
    copy_rows(p, band, words, maps.map, j, scratch + j * maps.map.size());

  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const int64_t size = strip_size(p.Wo);
  const auto& conv_tiles = size == 7 ? sevens<T> : fours<T>;
  const Cut cut = Cut::of(band.first_row, band.rows, band.count * strips_of_row(p.Wo), p.R, p.padding[0], p.H,
                          p.stride[0], p.dilation[0], strips_per_tile(size));
  const int64_t tiles = cut.tiles();
  for (int64_t i = 0; i < block_count; i += 2) {
    const bool two = i + 1 < block_count;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Ahead ahead = i + 2 < block_count ? ahead_of(tile, tiles) : Ahead{};
      int64_t first, count;
      cut.at(tile, first, count);
      conv_tiles[two][count - 1](maps, &blocks[i], first, taps, ahead);
    }
  }
  const auto out_of = [&](int64_t j) {
    return p.out + (p.route.order[band.start + j] * p.Ho + band.first_row) * p.Wo * p.C_out;
  };
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
