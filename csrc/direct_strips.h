// The pixels of a map in strips, neighbours of a row, that tiles of a convolution take a few of.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace den_kernels {
namespace {

// Strips that a tile of so many vectors of output channels sums at once.
constexpr int strips_per_tile(int64_t size, int64_t vectors = tile_vectors) {
  return static_cast<int>(sum_vectors / (vectors * size));
}
constexpr int most_strips = std::max(strips_per_tile(usual_strip, 1), strips_per_tile(other_strip, 1));
inline int64_t strips_of_row(int64_t columns) { return (columns + strip_size(columns) - 1) / strip_size(columns); }
inline int64_t strip_columns(int64_t columns) { return strips_of_row(columns) * strip_size(columns); }

// A tile's strips: begin .. begin + count - 1 of the `strips` strips behind the first `before`, of whole rows, counted
// column by column.
struct TileStrips {
  int64_t before, strips, begin, count;
};

// The strips of maps of so many columns, one after the other: the rows of all instances lie together, so that a tile of
// the first row or the last leaves out the taps on padding.
struct Strips {
  int64_t instances, columns, size, per_row;
  Strips(int64_t instances, int64_t columns)
      : instances(instances), columns(columns), size(strip_size(columns)), per_row(strips_of_row(columns)) {}
  int64_t count(int64_t rows) const { return instances * rows * per_row; }
  struct At {
    int64_t instance, row, column, live;  // column: the first; live: the pixels of the strip that lie on the map
  };
  // Strip q, the one behind a strip, and strips q0 and on: divisions take as long as a small tile's sums.
  KERNEL At at(int64_t q) const {
    const int64_t line = q / per_row, column = (q - line * per_row) * size, row = line / instances;
    return {line - row * instances, row, column, std::min(size, columns - column)};
  }
  KERNEL At after(At strip) const {
    strip.column += size;
    if (strip.column >= columns) {
      strip.column = 0;
      if (++strip.instance == instances) strip.instance = 0, ++strip.row;
    }
    strip.live = std::min(size, columns - strip.column);
    return strip;
  }
  template <int count>
  KERNEL void at(int64_t q0, At (&found)[count]) const {
    found[0] = at(q0);
    UNROLL for (int q = 1; q < count; ++q) found[q] = after(found[q - 1]);
  }
  // The strips of a tile: most tiles lie in one column of strips, and those at a map's left or right edge leave out the
  // taps on padding there.
  template <int count>
  KERNEL void at(const TileStrips& tile, At (&found)[count]) const {
    const auto quotient = [](int64_t a, int64_t b) {  // half the time of a division of 64 bits
      return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
    };
    const int64_t lines = quotient(tile.strips, per_row), first = quotient(tile.before, per_row);
    int64_t column = quotient(tile.begin, lines), line = tile.begin - column * lines;
    int64_t row = quotient(first + line, instances), instance = first + line - row * instances;
    const int64_t first_row = quotient(first, instances);  // whole rows: its first line is instance 0's
    UNROLL for (int q = 0; q < count; ++q) {
      found[q] = {instance, row, column * size, std::min(size, columns - column * size)};
      if (++instance == instances) instance = 0, ++row;
      if (++line == lines) line = 0, ++column, instance = 0, row = first_row;
    }
  }
};

// The rows of a tile's strips, and whether all of these begin in one column.
struct RowsOf {
  int64_t first, last;
  bool one_column;
  template <int count>
  KERNEL explicit RowsOf(const Strips::At (&at)[count])
      : first(at[0].row), last(at[0].row), one_column(at[0].column == at[count - 1].column) {
    UNROLL for (int q = 1; q < count; ++q) first = std::min(first, at[q].row), last = std::max(last, at[q].row);
  }
};

// Of `count` strips in as few tiles of at most `most` as there can be, all of about one size: the first of tile i.
inline int64_t tile_begin(int64_t count, int64_t most, int64_t i) {
  const int64_t tiles = (count + most - 1) / most;
  return tiles ? count * i / tiles : 0;
}

// The strips of a map, in the order of their rows, cut into tiles of at most `most`. The rows that meet padding above,
// those that meet none and those that meet padding below are cut apart.
struct Cut {
  int64_t strips[3], most;
  // Output rows first .. first + rows - 1 of a kernel of R rows, `top` rows of padding above H input rows.
  static Cut of(int64_t first, int64_t rows, int64_t per_row, int64_t R, int64_t top, int64_t H, int64_t stride,
                int64_t dilation, int64_t most) {
    const auto before = [&](int64_t limit) {  // rows that begin before input row `limit`, seen from the padding's first
      const int64_t y = limit <= 0 ? 0 : (limit + stride - 1) / stride;
      return std::min(std::max<int64_t>(y - first, 0), rows);
    };
    const int64_t above = before(top), inside = std::max(above, before(H + top - (R - 1) * dilation));
    return {{above * per_row, (inside - above) * per_row, (rows - inside) * per_row}, most};
  }
  int64_t tiles(int part) const { return (strips[part] + most - 1) / most; }
  int64_t tiles() const { return tiles(0) + tiles(1) + tiles(2); }
  TileStrips tile(int64_t i) const {
    int part = 0;
    int64_t before = 0;
    for (; i >= tiles(part); before += strips[part++]) i -= tiles(part);
    const int64_t begin = tile_begin(strips[part], most, i);
    return {before, strips[part], begin, tile_begin(strips[part], most, i + 1) - begin};
  }
};

}  // namespace
}  // namespace den_kernels
