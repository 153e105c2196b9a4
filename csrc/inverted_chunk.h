// The instances of an inverted residual that go through it together, their maps in scratch memory, and the strips of
// pixels that its expansion reads (direct_inverted_residual.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "direct_chunks.h"
#include "direct_strips.h"
#include "dynamic_inverted_residual.h"

namespace den_kernels {
namespace {

using Arguments = InvertedResidual;

constexpr int64_t tile_pixels = 12;  // divisible by the pixels of a tile
constexpr int64_t slack = 8 * 16;    // floats behind a plane of pixels, which strips that end early read

// The channels that all chunks of one selection use.
struct Selected {
  const Channels& hidden;
  const std::vector<Piece>& stream;  // inputs of conv1
  int64_t planes() const { return static_cast<int64_t>(hidden.blocks.size()); }
};

// The selected channels of planes that lie `plane` floats apart, as the inputs of a product.
std::vector<Piece> pieces_of(const Channels& hidden, int64_t plane) {
  std::vector<Piece> pieces;
  size_t i = 0;
  for (const Piece& piece : hidden.pieces) {
    while (hidden.blocks[i].index < piece.first / 16) ++i;
    pieces.push_back({piece.first, piece.width, static_cast<int64_t>(i) * plane + piece.first % 16});
  }
  return pieces;
}

// Instances order[start : start + count] of a route; more than one only where a band is a whole map. In scratch memory:
// `maps`, row sums and gates of all, then of each thread a ring, a band and a list of strips.
struct Chunk {
  const Arguments& block;
  const Selected& selected;
  int64_t start, count;
  int64_t columns;     // of the ring, padding included
  int64_t rows, ring;  // output rows of a band, rows of the ring
  float* scratch = nullptr;

  Chunk(const Arguments& p, const Selected& s, int64_t start, int64_t count)
      : block(p),
        selected(s),
        start(start),
        count(count),
        columns(std::max(p.W + p.S - 1, (p.Wo - 1) * p.stride + p.S)) {
    const auto floats = [&](int64_t r) { return planes() * 16 * (rows_read(r) * columns + (p.conv2 ? r * p.Wo : 0)); };
    const int64_t fits = scratch_bytes() / 4, line = floats(2) - floats(1);
    const int64_t most = std::clamp<int64_t>((fits - floats(1)) / std::max<int64_t>(line, 1) + 1, 1, p.Ho);
    const int64_t bands = (p.Ho + most - 1) / most;
    rows = (p.Ho + bands - 1) / bands;
    if (!p.conv2 && rows < p.Ho) rows = std::max<int64_t>(most / tile_pixels, 1) * tile_pixels;  // whole tiles
    ring = rows_read(rows);
  }
  int64_t planes() const { return selected.planes(); }
  int64_t rows_read(int64_t r) const { return (r - 1) * block.stride + block.R; }
  int64_t ring_plane() const { return count * ring * columns * 16; }
  int64_t plane_of(int64_t pixels) const { return count * pixels * 16 + slack; }
  int64_t map_plane() const { return plane_of(block.Ho * block.Wo); }
  bool in_two(int64_t threads) const { return block.Q || (block.conv2 && threads > 1); }

  int64_t maps_size(int64_t threads) const { return in_two(threads) ? planes() * map_plane() : 0; }
  int64_t sums_size() const { return block.Q ? count * block.Ho * planes() * 16 : 0; }
  int64_t gates_size() const { return block.Q ? count * planes() * 16 : 0; }
  int64_t ring_size() const { return planes() * ring_plane() + (block.conv2 ? 0 : slack); }
  int64_t band_size(int64_t threads) const {
    return in_two(threads) || !block.conv2 ? 0 : planes() * plane_of(rows * block.Wo);
  }
  int64_t strips_size() const;
  int64_t own_size(int64_t threads) const { return round_up(ring_size() + band_size(threads) + strips_size(), 16); }
  int64_t shared_size(int64_t threads) const { return maps_size(threads) + sums_size() + gates_size(); }
  int64_t bytes(int64_t threads) const { return 4 * (shared_size(threads) + threads * own_size(threads)); }

  float* sums(int64_t threads) const { return scratch + maps_size(threads); }
  float* gates(int64_t threads) const { return sums(threads) + sums_size(); }
  float* ring_of(int64_t thread, int64_t threads) const {
    return scratch + shared_size(threads) + thread * own_size(threads);
  }
  const float* x(int64_t instance, int64_t row) const {
    return block.x + (block.route.order[start + instance] * block.H + row) * block.W * block.C;
  }
};

// Chunks of several instances are those whose maps fit scratch memory together.
int64_t times_fitting(const Chunk& c) {
  if (c.rows < c.block.Ho) return 1;
  return std::min(2 * scratch_bytes() / c.bytes(1), chunk_pixels / (c.count * c.block.H * c.block.W));
}

// Where a strip of input pixels begins, and its place in a plane of the ring.
struct StripAt {
  const float* from;
  int64_t to;
};

// The strips of `columns` pixels that lie side by side: the last one ends where they do, and may overlap the one
// before; fewer pixels than a strip are copied, with zeros behind them.
struct RowStrips {
  int64_t columns, size, count;
  explicit RowStrips(int64_t columns) : columns(columns), size(strip_size(columns)), count(strips_of_row(columns)) {}
  bool copied() const { return columns < size; }
  int64_t column(int64_t i) const { return copied() ? 0 : std::min(i * size, columns - size); }
};

// The pixels that lie side by side in both the input and the ring: a row, and without conv2 a whole band of `rows`
// rows.
RowStrips strips_of(const Chunk& c, int64_t rows) { return RowStrips(c.block.conv2 ? c.block.W : rows * c.block.W); }

int64_t Chunk::strips_size() const {
  constexpr int narrow = std::min(usual_strip, other_strip), wide = std::max(usual_strip, other_strip);
  const int64_t lines = count * (block.conv2 ? ring : 1), most = strips_of(*this, ring).columns / narrow + 1;
  return lines * (most * static_cast<int64_t>(sizeof(StripAt)) / 4 + wide * block.C);
}

// The list of the strips of input rows first .. last - 1 of all instances; their number.
int64_t list_strips(const Chunk& c, int64_t first, int64_t last, StripAt* list, float* copies) {
  const Arguments& p = c.block;
  const RowStrips strips = strips_of(c, last - first);
  int64_t n = 0;
  for (int64_t j = 0; j < c.count; ++j) {
    for (int64_t row = first; row < (p.conv2 ? last : first + 1); ++row) {
      const float* x = c.x(j, row);
      if (strips.copied()) {
        std::memset(copies, 0, strips.size * p.C * sizeof(float));
        std::memcpy(copies, x, strips.columns * p.C * sizeof(float));
        x = copies, copies += strips.size * p.C;
      }
      const int64_t line = p.conv2 ? row % c.ring : 0, to = ((j * c.ring + line) * c.columns + p.S / 2) * 16;
      for (int64_t i = 0; i < strips.count; ++i) list[n++] = {x + strips.column(i) * p.C, to + strips.column(i) * 16};
    }
  }
  return n;
}

// Zeros in the columns of padding of a ring.
void clear_padding(const Chunk& c, float* ring) {
  const int64_t left = c.block.S / 2, right = left + c.block.W;
  for (int64_t row = 0; row < c.planes() * c.count * c.ring; ++row, ring += c.columns * 16) {
    std::memset(ring, 0, left * 16 * sizeof(float));
    std::memset(ring + right * 16, 0, (c.columns - right) * 16 * sizeof(float));
  }
}

}  // namespace
}  // namespace den_kernels
