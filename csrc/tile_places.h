// Where the tiles of a convolution lie in the map that it reads and in the one that it writes. They are found for all
// of them in one loop, once for all blocks of channels: in each tile anew that took as long as a small tile's sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "direct_tiles.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// A strip: where its first pixel begins in both maps, in values of each, and how many of its pixels lie on the map.
struct Place {
  int64_t from, to, live;
};

// A tile: `count` strips from place `first` on, and the taps that do not fall on padding.
struct PlacedTile {
  int64_t first, count;
  Taps taps;
};

struct PlacedTiles {
  std::vector<Place> places;
  std::vector<PlacedTile> tiles;
};

// The kernel of a convolution: the offsets of its R x S taps, and what says which of them fall on padding. rows:
// counted from output row `top` on; W = 0: columns are not looked at.
struct Window {
  const int64_t* at;
  int64_t R, S, stride[2], dilation[2], padding[2], H, W, top;
  // Of output rows first .. last, and of strips of `size` pixels in one column, or column < 0: in several.
  Taps taps(int64_t first, int64_t last, int64_t column, int64_t size) const {
    Taps found = taps_on_map(at, R, S, top + first, top + last, stride[0], dilation[0], padding[0], padding[0] + H - 1);
    if (W && column >= 0) find_columns(found, column, size, {S, stride[1], dilation[1], padding[1], W});
    return found;
  }
};

// The tiles of a cut, in memory that a thread keeps until its next call. place(instance, row, column): of a pixel.
template <class PlaceOf>
const PlacedTiles& place_tiles(const Strips& strips, const Cut& cut, const Window& window, PlaceOf place) {
  thread_local PlacedTiles made;
  made.places.resize(static_cast<size_t>(cut.strips[0] + cut.strips[1] + cut.strips[2]));
  made.tiles.clear();
  Place* next = made.places.data();
  for (int64_t part = 0, first_row = 0; part < 3; ++part) {
    const int64_t count = cut.strips[part], rows = count / (strips.per_row * strips.instances);
    const int64_t end_row = first_row + rows, tiles = cut.tiles(static_cast<int>(part));
    int64_t begin = 0, column = 0, row = first_row, instance = 0;
    for (int64_t tile = 1; tile <= tiles; ++tile) {
      const int64_t end = tile_begin(count, cut.most, tile), first = row, first_column = column;
      int64_t last = row, last_column = column;
      made.tiles.push_back({next - made.places.data(), end - begin, {}});
      for (; begin < end; ++begin, ++next) {
        last = row, last_column = column;
        *next = place(instance, row, column);
        next->live = std::min(strips.size, strips.columns - column);
        if (++instance < strips.instances) continue;
        instance = 0;
        if (++row == end_row) row = first_row, column += strips.size;
      }
      made.tiles.back().taps = first_column == last_column ? window.taps(first, last, first_column, strips.size)
                                                           : window.taps(first_row, end_row - 1, -1, strips.size);
    }
    first_row = end_row;
  }
  return made;
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
