// The channels that the instances of a route use, cut into the pieces that the direct kernels take at a time. A level
// is the selection of a prefix of the groups; a mask is any other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace den_kernels {

// The channel groups that the segments of a route select: segment s is order[offsets[s] : offsets[s + 1]].
struct Selections {
  int64_t S, G;
  const int32_t* order;    // [B] instances; the segments with most groups first
  const int32_t* offsets;  // [S + 1]
  const bool* mask;  // [B, G] of a route of masks; null: levels, S = G + 1, segment s selects the first G - s groups
  int64_t count(int64_t s) const { return offsets[s + 1] - offsets[s]; }
  bool has(int64_t s, int64_t group) const { return mask ? mask[order[offsets[s]] * G + group] : group < G - s; }
};

struct Range {
  int64_t first, width;
};

// Consecutive channels of one block of 16, and where they lie on a map that holds the selected channels alone.
struct Piece {
  int64_t first, width, place;
};

// A block of 16 or 32 channels: a bit for each selected one, and the place of the first of these on a map of them
// alone.
struct Block {
  int64_t index;
  uint32_t lanes;
  int64_t place;
};

// The channels of one selection, all ascending.
struct Channels {
  int64_t count = 0, end = 0;  // their number, and the channel after the last
  std::vector<Range> ranges;   // maximal
  std::vector<Piece> pieces;
  std::vector<Block> blocks;  // that hold any
  std::vector<Range> gaps;    // the channels of the other blocks
};

// Pieces of at most `most` channels.
inline std::vector<Piece> cut(const std::vector<Range>& ranges, int64_t most) {
  std::vector<Piece> pieces;
  int64_t place = 0;
  for (const Range& range : ranges)
    for (int64_t first = range.first, end = range.first + range.width; first < end;) {
      const int64_t width = std::min({most, end - first, 16 - first % 16});
      pieces.push_back({first, width, place});
      first += width;
      place += width;
    }
  return pieces;
}

// The selection of these ranges out of `channels` channels, in blocks of `block` channels.
inline Channels channels_of(const std::vector<Range>& ranges, int64_t channels, int64_t block) {
  Channels made;
  made.ranges = ranges;
  made.pieces = cut(ranges, 16);
  int64_t dead = 0;  // end of the last block that holds a selected channel
  const auto close = [&](int64_t until) {
    if (until > dead) made.gaps.push_back({dead, until - dead});
  };
  for (const Piece& piece : made.pieces) {
    const int64_t index = piece.first / block;
    if (made.blocks.empty() || made.blocks.back().index != index) {
      close(index * block);
      dead = std::min((index + 1) * block, channels);
      made.blocks.push_back({index, 0, piece.place});
    }
    made.blocks.back().lanes |= ((1u << piece.width) - 1) << piece.first % block;
    made.count += piece.width;
    made.end = piece.first + piece.width;
  }
  close(channels);
  return made;
}

// The channels of each segment; none for one without instances. sizes: of the channel groups; empty: not elastic.
inline std::vector<Channels> channels_of(const Selections& route, const std::vector<int64_t>& sizes, int64_t channels,
                                         int64_t block) {
  std::vector<Channels> made(route.S);
  for (int64_t s = 0; s < route.S; ++s) {
    if (!route.count(s)) continue;
    std::vector<Range> ranges;
    if (sizes.empty()) ranges.push_back({0, channels});
    for (int64_t g = 0, first = 0; g < static_cast<int64_t>(sizes.size()); first += sizes[g++]) {
      if (!route.has(s, g)) continue;
      if (ranges.empty() || ranges.back().first + ranges.back().width < first) ranges.push_back({first, 0});
      ranges.back().width += sizes[g];
    }
    made[s] = channels_of(ranges, channels, block);
  }
  return made;
}

// The channels that each level 0..G keeps.
inline std::vector<int64_t> widths_of(const std::vector<int64_t>& sizes, int64_t channels) {
  std::vector<int64_t> widths{0};
  for (const int64_t size : sizes) widths.push_back(widths.back() + size);
  if (sizes.empty()) widths.push_back(channels);
  return widths;
}

}  // namespace den_kernels
