// Inner loops of a direct convolution, in vectors (vectors.h): nothing here is called but from a function compiled for
// it. Where an element is narrower than a word (direct_words.h), its channels go by words: a sum takes the products of
// a whole word.
//   by output channels   a vector holds 16 output channels of a pixel; input values are broadcast
//   by pixels            a vector holds 16 pixels of an output channel; weights are broadcast
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "direct_chunks.h"
#include "direct_strips.h"
#include "direct_words.h"

namespace den_kernels {
namespace {

// Over the rows of a tile's sums, as many as there are registers: sums that a loop reaches lie in memory.
#define UNROLL_ROWS _Pragma("GCC unroll 32")

constexpr int64_t prefetch_floats = 8 * 16;  // weights are asked for eight steps ahead: they stream from further out

template <class Tile, int vectors, int size, int... fewer>
constexpr auto tiles_by_strips(std::integer_sequence<int, fewer...>) {
  return std::array{&Tile::template run<vectors, fewer + 1, size>...};
}

template <class Tile, int vectors>
auto tile_of_vectors(int64_t size, int64_t strips) {
  static constexpr auto usual =
      tiles_by_strips<Tile, vectors, usual_strip>(std::make_integer_sequence<int, Tile::most(vectors, usual_strip)>{});
  static constexpr auto other =
      tiles_by_strips<Tile, vectors, other_strip>(std::make_integer_sequence<int, Tile::most(vectors, other_strip)>{});
  return size == other_strip ? other[strips - 1] : usual[strips - 1];
}

// The function of a tile, Tile::run<vectors, strips, size>: `vectors` of 16 channels, 1 .. Tile::vectors, for `strips`
// of `size` pixels each (strip_size). Tile::most(vectors, size): the strips that its registers hold.
template <class Tile>
auto tile_of(int64_t size, int64_t vectors, int64_t strips) {
  if constexpr (Tile::vectors > 2) {
    if (vectors == 3) return tile_of_vectors<Tile, 3>(size, strips);
  }
  if constexpr (Tile::vectors > 1) {
    if (vectors == 2) return tile_of_vectors<Tile, 2>(size, strips);
  }
  return tile_of_vectors<Tile, 1>(size, strips);
}

// A tile of few vectors, cut by strips_per_tile.
struct UsualTile {
  static constexpr int vectors = tile_vectors;
  static constexpr int most(int vectors, int size) { return strips_per_tile(size, vectors); }
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// Weights are packed by pack_weights; of a tap, input channels lie 16 outputs apart.
KERNEL const float* weights_of(const float* weight, const Piece& piece, int64_t tap_count) {
  return weight + (piece.first / 16 * tap_count * 16 + piece.first % 16) * 16;
}

// The weights that the next tiles will read, where the present ones leave them out of the second level: rows first ..
// first + count of every 16, `distance` floats from the present ones. Each tile asks for its share.
struct Ahead {
  int64_t first, count, distance;
};
KERNEL Ahead ahead_of(int64_t tile, int64_t tiles) {
  const int64_t count = (16 + tiles - 1) / tiles, first = std::min<int64_t>(16, tile * count);
  return {first, std::min<int64_t>(count, 16 - first), 0};
}

// The taps of a kernel at a tile: the offset of each from the first, and the range [begin, end) of those whose row does
// not fall on padding. Of a row's `columns` taps, those before `left` meet padding in the first pixel of each strip,
// and those from `right` on in the last.
struct Taps {
  const int64_t* at;
  int64_t count, begin, end;
  int64_t columns = 0, left = 0, right = std::numeric_limits<int64_t>::max();
};

// The taps of a kernel of R rows and S columns for output rows first .. last. lowest, highest: the first and the last
// input row, counted from tap row 0 of output row 0.
KERNEL Taps taps_on_map(const int64_t* at, int64_t R, int64_t S, int64_t first, int64_t last, int64_t stride,
                        int64_t dilation, int64_t lowest, int64_t highest) {
  const int64_t above = lowest - last * stride, below = highest - first * stride;  // in input rows from tap row 0
  const int64_t begin = above <= 0 ? 0 : std::min(R, (above + dilation - 1) / dilation);
  const int64_t end = below < 0 ? begin : std::max(begin, std::min(R, below / dilation + 1));
  return {at, R * S, begin * S, end * S};
}

// Columns of a kernel, their stride and dilation, and those of the map that it reads, behind so much padding.
struct Columns {
  int64_t S, stride, dilation, padding, W;
  // Taps of output column `at` that lie before input column `limit`.
  KERNEL int64_t before(int64_t at, int64_t limit) const {
    const int64_t distance = limit + padding - at * stride;
    if (distance <= 0) return 0;
    return distance > (S - 1) * dilation ? S : dilation == 1 ? distance : (distance + dilation - 1) / dilation;
  }
};

// Finds `left` and `right` of strips of `size` pixels that begin in one column.
KERNEL void find_columns(Taps& taps, int64_t column, int64_t size, const Columns& columns) {
  taps.columns = columns.S;
  taps.left = columns.before(column, 0);
  taps.right = std::max(taps.left, columns.before(column + size - 1, columns.W));
}

// Products that are added up before a sum begins anew: rounding errors grow with the length of these parts, not with
// that of the whole. The parts of 1 x 1 kernels are as short as oneDNN's are there; shorter ones cost time.
constexpr int64_t part_products(int64_t taps) { return taps == 1 ? 256 : 576; }

template <int rows, int vectors>
KERNEL void set_zero(Vector (&acc)[rows][vectors]) {
  UNROLL_ROWS for (int i = 0; i < rows; ++i) { UNROLL for (int v = 0; v < vectors; ++v) acc[i][v] = zeros(); }
}

// The finished parts of a tile's sums. A part ends behind the same piece whatever the tile and the instruction set.
template <int rows, int vectors>
struct Parts {
  alignas(64) float sums[rows * vectors * 16];
  int64_t products = 0;  // of the part at hand
  bool any = false;
  // Before the part at hand takes another piece of the channels: it is put away, and begun anew, where it is long.
  KERNEL void extend(Vector (&acc)[rows][vectors], int64_t width, int64_t taps) {
    __asm__("" : "+m"(*this));  // stays in memory: the loops over taps and channels need all registers
    if (products >= part_products(taps)) {
      if (any) add_to(acc);
      UNROLL_ROWS for (int i = 0; i < rows; ++i) {
        UNROLL for (int v = 0; v < vectors; ++v) store16(sums + (i * vectors + v) * 16, acc[i][v]);
      }
      set_zero(acc);
      any = true;
      products = 0;
    }
    products += width * taps;
  }
  KERNEL void add_to(Vector (&acc)[rows][vectors]) const {
    UNROLL_ROWS for (int i = 0; i < rows; ++i) {
      UNROLL for (int v = 0; v < vectors; ++v) acc[i][v] = add(acc[i][v], load16(sums + (i * vectors + v) * 16));
    }
  }
};

// The bias is added to the sums of a tile: a sum that began with it would round all its products to the bias's size.
template <int rows, int vectors>
KERNEL void add_bias(Vector (&acc)[rows][vectors], const Vector (&bias)[vectors]) {
  UNROLL_ROWS for (int i = 0; i < rows; ++i) {
    UNROLL for (int v = 0; v < vectors; ++v) acc[i][v] = add(acc[i][v], bias[v]);
  }
}

// acc[q * size + p][v] += weight[v] * input[q, p] of one channel of one tap, for the pixels first .. last - 1 of each
// strip. w: of the first vector. Where `planar`, pixels lie side by side, `at` floats behind `in`; else the channel is
// `at` floats behind `in`, and pixels lie `pixel` floats apart.
template <class T, int vectors, int strips, int size, int first, int last, bool planar>
KERNEL void sum_channel(Vector (&acc)[strips * size][vectors], const float* const (&in)[strips], int64_t at,
                        int64_t pixel, const float* w, int64_t weight_vector) {
  Vector wv[vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    wv[v] = load16(w + v * weight_vector);
    if (vectors == tile_vectors)  // else the sums leave no load free for it
      _mm_prefetch(reinterpret_cast<const char*>(w + v * weight_vector + prefetch_floats), _MM_HINT_T0);
  }
  UNROLL for (int q = 0; q < strips; ++q) {
    UNROLL for (int p = first; p < last; ++p) {
      const Vector value = broadcast(in[q][at + p * (planar ? 1 : pixel)]);
      UNROLL for (int v = 0; v < vectors; ++v) {
        acc[q * size + p][v] = multiply_add<T>(value, wv[v], acc[q * size + p][v]);
      }
    }
  }
}

// acc[q * size + p][v] += sum over the `width` channels k of a piece of weight[v][k] * input[q, p, k] of one tap, for
// the pixels first .. last - 1 of each strip. Where `planar`, the tap begins `at` floats behind `in`. Else pointers
// move on once in tile_steps channels, which saves instructions.
template <class T, int vectors, int strips, int size, int first, int last, bool planar>
KERNEL void sum_tap(Vector (&acc)[strips * size][vectors], const float* (&in)[strips], int64_t at, int64_t pixel,
                    int64_t channel, const float* w, int64_t width, int64_t weight_vector) {
  constexpr int steps = planar ? 1 : tile_steps;
  const float* end = w + width * 16;
  for (const float* whole = w + width / steps * steps * 16; w != whole; w += steps * 16) {
    UNROLL for (int k = 0; k < steps; ++k) {
      sum_channel<T, vectors, strips, size, first, last, planar>(acc, in, planar ? at : k, pixel, w + k * 16,
                                                                 weight_vector);
    }
    if (planar) at += channel;
    UNROLL for (int q = 0; q < strips && !planar; ++q) in[q] += steps;
  }
  for (; steps > 1 && w != end; w += 16) {
    sum_channel<T, vectors, strips, size, first, last, planar>(acc, in, 0, pixel, w, weight_vector);
    UNROLL for (int q = 0; q < strips; ++q) in[q] += 1;
  }
}

// acc[q * size + p][v] = sum over the channels k of pieces and taps of weight[v][k][tap] * input[q + tap, p, k]
// A piece is a cache line of every pixel: it serves all taps before the weights push it out of the first level.
template <class T, int vectors, int strips, int size, bool planar>
KERNEL void sum_channels(Vector (&acc)[strips * size][vectors], const float* const (&input)[strips], int64_t pixel,
                         int64_t channel, const Taps& taps, const float* weight, int64_t weight_vector,
                         const std::vector<Piece>& pieces, const Ahead& ahead) {
  set_zero(acc);
  Parts<strips * size, vectors> parts;
  for (const Piece& piece : pieces) {
    if constexpr (per_word<T> == 1) parts.extend(acc, piece.width, taps.count);
    const float* of_piece = weights_of(weight, piece, taps.count);
    for (int64_t t = taps.begin, column = 0; t < taps.end; ++t) {
      const float* in[strips];
      const int64_t at = taps.at[t] + piece.place * channel;
      UNROLL for (int q = 0; q < strips; ++q) in[q] = planar ? input[q] : input[q] + at;
      const float* w = of_piece + t * 256;
      for (int64_t row = ahead.first; row < ahead.first + ahead.count; ++row) {
        UNROLL for (int v = 0; v < vectors; ++v) {
          _mm_prefetch(reinterpret_cast<const char*>(w + ahead.distance + row * 16 + v * weight_vector), _MM_HINT_T1);
        }
      }
      if (column < taps.left)
        sum_tap<T, vectors, strips, size, 1, size, planar>(acc, in, at, pixel, channel, w, piece.width, weight_vector);
      else if (column >= taps.right)
        sum_tap<T, vectors, strips, size, 0, size - 1, planar>(acc, in, at, pixel, channel, w, piece.width,
                                                               weight_vector);
      else
        sum_tap<T, vectors, strips, size, 0, size, planar>(acc, in, at, pixel, channel, w, piece.width, weight_vector);
      if (++column == taps.columns) column = 0;
    }
  }
  if (parts.any) parts.add_to(acc);
}

// acc[o][v] = sum over the channels k of pieces and taps of weight[o][k][tap] * input[v + tap, k], v a vector of 16
// pixels. The packed weights of neighbouring outputs are neighbours.
template <int outputs, int vectors>
KERNEL void sum_pixels(Vector (&acc)[outputs][vectors], const float* const (&input)[vectors], int64_t channel,
                       const int64_t* taps, int64_t tap_count, const float* weight, const std::vector<Piece>& pieces) {
  set_zero(acc);
  Parts<outputs, vectors> parts;
  for (const Piece& piece : pieces) {
    parts.extend(acc, piece.width, tap_count);
    const float* of_piece = weights_of(weight, piece, tap_count);
    for (int64_t t = 0; t < tap_count; ++t) {
      const float* in[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) in[v] = input[v] + taps[t] + piece.place * channel;
      const float* w = of_piece + t * 256;
      for (const float* end = w + piece.width * 16; w != end; w += 16) {
        Vector values[vectors];
        UNROLL for (int v = 0; v < vectors; ++v) {
          values[v] = load16(in[v]);
          in[v] += channel;
        }
        UNROLL for (int o = 0; o < outputs; ++o) {
          const Vector scalar = broadcast(w[o]);
          UNROLL for (int v = 0; v < vectors; ++v) acc[o][v] = fma(scalar, values[v], acc[o][v]);
        }
      }
    }
  }
  if (parts.any) parts.add_to(acc);
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
