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
  // The first strip of tile i, and how many it has.
  void at(int64_t i, int64_t& first, int64_t& count) const {
    int part = 0;
    for (first = 0; i >= tiles(part); first += strips[part++]) i -= tiles(part);
    const int64_t begin = tile_begin(strips[part], most, i);
    count = tile_begin(strips[part], most, i + 1) - begin;
    first += begin;
  }
};

}  // namespace
}  // namespace den_kernels
