// A band (conv_bands.h) copies the input rows that it reads, padded, into scratch memory that stays in the core's cache
// (band_map.h), convolves (direct_tiles.h) and writes its output rows whole, zeros included.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "band_map.h"
#include "direct_tiles.h"
#include "tile_places.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// A band in scratch memory.
template <class T>
struct Maps {
  const ConvArguments<T>& arguments;
  const Band& band;
  const std::vector<Piece>& pieces;  // the channels of a tap
  BandMap<T> map;
  Strips strips;  // strips of the band's output rows
  const float* scratch;
  // Where an instance's row of outputs begins, in values of T from p.out on.
  int64_t output(int64_t instance, int64_t row) const {
    const ConvArguments<T>& p = arguments;
    return p.route.order[band.start + instance] * p.instance + (band.first_row + row) * p.row;
  }
};

// Where the tiles of a cut of the band lie, in the scratch memory and from p.out on. Joined taps are of several
// columns, of which some lie on padding: they read it.
template <class T>
const PlacedTiles& tiles_of(const Maps<T>& m, const Cut& cut, const int64_t* taps) {
  const ConvArguments<T>& p = m.arguments;
  Window window{taps, p.R, p.tap_columns(), {}, {}, {}, p.H, p.joined ? 0 : p.W, m.band.first_row};
  for (int i = 0; i < 2; ++i)
    window.stride[i] = p.stride[i], window.dilation[i] = p.dilation[i], window.padding[i] = p.padding[i];
  return place_tiles(m.strips, cut, window, [&](int64_t instance, int64_t row, int64_t column) -> Place {
    const int64_t from = (row * p.stride[0] * m.map.columns + column * p.stride[1]) * m.map.pixel;
    return {instance * m.map.size() + from, m.output(instance, row) + column * p.pixel, 0};
  });
}

// The blocks of output channels block[0 .. vectors - 1] of a tile's strips: the sums, and zeros in lanes not selected.
template <class T>
struct ConvTile : UsualTile {
  template <int vectors, int strips, int size>
  static void run(const Maps<T>& m, const Block* block, const Place* places, const Taps& taps, Ahead ahead) {
    const ConvArguments<T>& p = m.arguments;
    const float* input[strips];
    UNROLL for (int q = 0; q < strips; ++q) {
      input[q] = m.scratch + places[q].from;
      const T* out = p.out + places[q].to;
      UNROLL for (int i = 0; i < size; ++i) {  // asked for now: it is in the cache when the sums are done
        UNROLL for (int v = 0; v < vectors; ++v) {
          _mm_prefetch(reinterpret_cast<const char*>(out + i * p.pixel + block[v].index * 16), _MM_HINT_T1);
        }
      }
    }
    Vector acc[strips * size][vectors];
    const int64_t weight_vector = weight_words<T>(p.tap_channels(), p.R * p.tap_columns());
    if (ahead.count) ahead.distance = (block[vectors].index - block[0].index) * weight_vector;
    sum_channels<T, vectors, strips, size, false>(
        acc, input, m.map.pixel * p.stride[1], 1, taps, words_of(p.weight) + block[0].index * weight_vector,
        (block[vectors - 1].index - block[0].index) * weight_vector, m.pieces, ahead);
    if (p.bias) {
      Vector bias[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) {
        bias[v] = load16(p.bias + block[v].index * 16, static_cast<Lanes>(block[v].lanes));
      }
      add_bias(acc, bias);
    }
    const Vector least = broadcast(least_of(p));
    UNROLL for (int q = 0; q < strips; ++q) {
      T* out = p.out + places[q].to;
      UNROLL for (int i = 0; i < size; ++i) {
        if (i >= places[q].live) break;
        UNROLL for (int v = 0; v < vectors; ++v) {
          const Vector sum = keep(at_least(least, acc[q * size + i][v]), static_cast<Lanes>(block[v].lanes));
          store16(out + i * p.pixel + block[v].index * 16, sum, lanes_of(p.C_out - block[v].index * 16));
        }
      }
    }
  }
};

template <class T>
void run_band(const ConvArguments<T>& p, const Band& band, const Channels& words, float* scratch) {
  const std::vector<Piece> joined = p.joined ? cut({{0, p.tap_channels()}}, 16) : std::vector<Piece>{};
  const Maps<T> maps{
      p, band, p.joined ? joined : words.pieces, BandMap<T>(p, band, words.count), Strips(band.count, p.Wo), scratch};
  int64_t taps[max_taps];
  maps.map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count && words.count; ++j)
    copy_rows(p, band, words, maps.map, j, scratch + j * maps.map.size());

  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size()), size = maps.strips.size;
  const PlacedTiles* placed = nullptr;
  for (int64_t i = 0, placed_for = 0; i < block_count; i += tile_vectors) {
    const int vectors = tile_vectors > 1 && i + 1 < block_count ? 2 : 1;
    if (vectors != placed_for) {
      const Cut cut = Cut::of(band.first_row, band.rows, maps.strips.count(1), p.R, p.padding[0], p.H, p.stride[0],
                              p.dilation[0], strips_per_tile(size, vectors));
      placed = &tiles_of(maps, cut, taps);
      placed_for = vectors;
    }
    const int64_t tiles = static_cast<int64_t>(placed->tiles.size());
    for (int64_t k = 0; k < tiles; ++k) {
      const Ahead ahead = i + tile_vectors < block_count ? ahead_of(k, tiles) : Ahead{};
      const PlacedTile& tile = placed->tiles[k];
      tile_of<ConvTile<T>>(size, vectors, tile.count)(maps, &blocks[i], &placed->places[tile.first], tile.taps, ahead);
    }
  }
  for (const Range& gap : band.outputs.gaps)
    for (int64_t j = 0; j < band.count; ++j)
      for (int64_t row = 0; row < band.rows; ++row) {
        T* out = p.out + maps.output(j, row) + gap.first;
        const bool whole = gap.width == p.pixel;  // no other values lie between
        if (whole) std::memset(out, 0, p.Wo * p.pixel * sizeof(T));
        for (int64_t i = 0; i < p.Wo && !whole; ++i) std::memset(out + i * p.pixel, 0, gap.width * sizeof(T));
      }
}

#pragma GCC pop_options

template <class T>
void run_direct(const ConvArguments<T>& p) {
  std::map<const Channels*, Channels> words;  // the channels that a segment reads, in words
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
