// A chunk of instances of one level is taken by a thread (or, when there are fewer instances than threads can share, by
// all threads together). bn1 and ReLU write the padded input map into scratch memory, conv1 writes the
// padded hidden map beside it, conv2 adds its sums into the residual stream. Both maps stay in the core's cache; of
// main memory only the residual stream is touched, once. Of the two inner loops (direct_tiles.h) the one by output
// channels is the rule; conv1 goes by pixels for widths that would leave its lanes empty (4, 8 hidden channels), on
// maps 16 pixels wide or more. Maps are [pixel][channel] for the first and [channel][pixel] for the second; conv2 reads
// either.
//
// In bfloat16 all of it goes by pairs of channels, 32 bits as a float is: maps hold pairs, and an odd selection's last
// pair has a zero.
#pragma once

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "direct_chunks.h"
#include "direct_tiles.h"
#include "dynamic_residual.h"
#include "tile_places.h"

namespace den_kernels {
namespace {

// A zero-padded map in scratch memory, wide enough for whole strips of the convolution that reads it.
struct PaddedMap {
  int64_t H, W, rows, columns, channels;  // channels: with the gap of `spread`
  bool planar;                            // [channel][pixel] instead of [pixel][channel]
  int64_t pixel() const { return planar ? 1 : channels; }
  int64_t channel() const { return planar ? rows * columns : 1; }
  int64_t size() const { return rows * columns * channels; }
};

PaddedMap padded_map(int64_t H, int64_t W, int64_t channels, bool planar, int64_t R, int64_t S, int64_t stride) {
  const int64_t Wo = (W + stride - 1) / stride;
  const int64_t read = (strip_columns(Wo) - 1) * stride + S, padded = W + S - 1;
  const int64_t pitch = spread_maps && !planar ? spread(channels) : channels;
  return {H, W, H + R - 1, read > padded ? read : padded, pitch, planar};
}

// The channels of a selection, and the same in words.
struct Selected {
  const Channels &channels, &words;
};

// The data that both convolutions of one chunk use.
template <class T>
struct Chunk {
  const ResidualBlock<T>& block;
  int64_t start, count;
  const Channels& stream;  // in words
  Selected hidden;
  std::vector<Piece> fours;  // the hidden channels in fours, for planar maps
  PaddedMap a, h;
  Strips strips;     // strips of the hidden and the output map
  Cut conv1, conv2;  // their tiles, for each convolution
  float* scratch;
  float* a_of(int64_t j) const { return scratch + j * (a.size() + h.size()); }
  float* h_of(int64_t j) const { return a_of(j) + a.size(); }
  int64_t bytes(int64_t) const { return count * (a.size() + h.size()) * 4; }
  int64_t hidden_blocks() const {
    const size_t blocks = hidden.channels.blocks.size();
    return static_cast<int64_t>(h.planar ? fours.size() : (blocks + tile_vectors - 1) / tile_vectors);
  }
  int64_t hidden_count() const { return hidden_blocks() * (h.planar ? count * vector_rows() : conv1.tiles()); }
  int64_t output_count() const { return (block.C_out / 16 + tile_vectors - 1) / tile_vectors * conv2.tiles(); }
  int64_t vector_rows() const { return (block.Ho * block.Wo / 16 + 3) / 4; }  // tiles of four vectors of 16 pixels
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// The offset of tap (r, s) from tap (0, 0) in a map.
template <class T>
KERNEL int64_t tap_offsets(const ResidualBlock<T>& b, const PaddedMap& map, int64_t* taps) {
  for (int64_t r = 0; r < b.R; ++r)
    for (int64_t s = 0; s < b.S; ++s) taps[r * b.S + s] = (r * map.columns + s) * map.pixel();
  return b.R * b.S;
}

// The kernel of the convolution that reads a map with "same" padding.
template <class T>
Window window_of(const Chunk<T>& c, const PaddedMap& map, int64_t stride, const int64_t* taps) {
  const int64_t R = c.block.R, S = c.block.S;
  return {taps, R, S, {stride, stride}, {1, 1}, {R / 2, S / 2}, map.H, map.W, 0};
}

// The tiles of conv1, from c.scratch on in both maps, and of conv2, from c.scratch to the output's first value.
template <class T>
const PlacedTiles& hidden_tiles(const Chunk<T>& c, const int64_t* taps) {
  const ResidualBlock<T>& b = c.block;
  const PaddedMap &a = c.a, &h = c.h;
  const int64_t maps = a.size() + h.size(), behind = a.size() + (b.R / 2 * h.columns + b.S / 2) * h.pixel();
  return place_tiles(
      c.strips, c.conv1, window_of(c, a, b.stride, taps), [&](int64_t instance, int64_t row, int64_t column) -> Place {
        const int64_t from = (row * a.columns + column) * b.stride * a.pixel();
        return {instance * maps + from, instance * maps + behind + (row * h.columns + column) * h.pixel(), 0};
      });
}
template <class T>
const PlacedTiles& output_tiles(const Chunk<T>& c, const int64_t* taps) {
  const ResidualBlock<T>& b = c.block;
  const PaddedMap& h = c.h;
  const int64_t maps = c.a.size() + h.size(), before = c.a.size();
  const int32_t* order = b.route.order + c.start;
  return place_tiles(c.strips, c.conv2, window_of(c, h, 1, taps),
                     [&](int64_t instance, int64_t row, int64_t column) -> Place {
                       const int64_t from = instance * maps + before + (row * h.columns + column) * h.pixel();
                       return {from, ((order[instance] * b.Ho + row) * b.Wo + column) * b.C_out, 0};
                     });
}

// One tile of conv1, blocks slot and on of the hidden channels: relu(sum + bias) into the hidden map, [pixel][channel].
template <class T>
struct HiddenTile : UsualTile {
  template <int vectors, int strips, int size>
  static void run(const Chunk<T>& c, int64_t slot, const Place* places, const Taps& taps, Ahead ahead) {
    const ResidualBlock<T>& b = c.block;
    const Block *block = &c.hidden.channels.blocks[slot], *words = &c.hidden.words.blocks[slot];
    const int64_t tap_count = b.R * b.S;
    const float* input[strips];
    UNROLL for (int q = 0; q < strips; ++q) input[q] = c.scratch + places[q].from;
    Vector acc[strips * size][vectors], bias[vectors];
    const int64_t weight_vector = weight_words<T>(b.C, tap_count);
    const float* weight = words_of(b.conv1) + block[0].index * weight_vector;
    const bool last = slot + vectors == static_cast<int64_t>(c.hidden.channels.blocks.size());
    ahead.distance = last ? words_of(b.conv2) - weight : (block[vectors].index - block[0].index) * weight_vector;
    sum_channels<T, vectors, strips, size, false>(acc, input, c.a.pixel() * b.stride, 1, taps, weight,
                                                  (block[vectors - 1].index - block[0].index) * weight_vector,
                                                  c.stream.pieces, ahead);
    UNROLL for (int v = 0; v < vectors; ++v) {
      bias[v] = load16(b.bias1 + block[v].index * 16, static_cast<Lanes>(block[v].lanes));
    }
    add_bias(acc, bias);
    UNROLL for (int q = 0; q < strips; ++q) {
      float* h = c.scratch + places[q].to;
      UNROLL for (int p = 0; p < size; ++p) {
        if (p >= places[q].live) break;
        UNROLL for (int v = 0; v < vectors; ++v) {
          const Vector value = relu(acc[q * size + p][v]);
          store_words<T>(h + p * c.h.pixel() + words[v].place, value, block[v].lanes, words[v].lanes);
        }
      }
    }
  }
};

// One tile of conv1 by pixels: the hidden channels of a piece, up to plane_vectors of 16 pixels from v0, into the
// planar hidden map.
template <int outputs>
KERNEL void hidden_plane(const Chunk<float>& c, int64_t j, const Piece& piece, int64_t v0, int64_t live,
                         const int64_t* taps) {
  constexpr int vectors = plane_vectors(outputs);
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, per_row = b.Wo / 16;
  const float* input[vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const int64_t at = v0 + (v < live ? v : 0);
    input[v] = c.a_of(j) + at / per_row * c.a.columns + at % per_row * 16;
  }
  Vector acc[outputs][vectors];
  const float* weight = b.conv1 + piece.first / 16 * round_up(b.C, 16) * tap_count * 16 + piece.first % 16;
  sum_pixels<outputs, vectors>(acc, input, c.a.channel(), taps, tap_count, weight, c.stream.pieces);
  UNROLL for (int v = 0; v < vectors; ++v) {
    if (v >= live) break;
    const int64_t row = (v0 + v) / per_row + b.R / 2, column = (v0 + v) % per_row * 16 + b.S / 2;
    UNROLL for (int o = 0; o < outputs; ++o) {
      const Vector sum = add(acc[o][v], broadcast(b.bias1[piece.first + o]));
      store16(c.h_of(j) + (piece.place + o) * c.h.channel() + row * c.h.columns + column, relu(sum));
    }
  }
}

// Four vectors of pixels of conv1, or the `live` ones that there are.
template <int outputs>
void hidden_planes(const Chunk<float>& c, int64_t j, const Piece& piece, int64_t v0, int64_t live,
                   const int64_t* taps) {
  for (int64_t v = 0; v < live; v += plane_vectors(outputs)) hidden_plane<outputs>(c, j, piece, v0 + v, live - v, taps);
}

// One tile of conv2: sums added to the shortcut.
template <class T, bool planar>
struct OutputTile : UsualTile {
  template <int vectors, int strips, int size>
  static void run(const Chunk<T>& c, int64_t block16, const Place* places, const Taps& taps, Ahead ahead) {
    const ResidualBlock<T>& b = c.block;
    const int64_t tap_count = b.R * b.S, channel = block16 * 16;
    const float* input[strips];
    const bool apart = b.out != b.shortcut;
    UNROLL for (int q = 0; q < strips; ++q) {
      input[q] = c.scratch + places[q].from;
      const int64_t to = places[q].to + channel;
      UNROLL for (int p = 0; p < size; ++p) {  // asked for now: they are in the cache when the sums are done
        UNROLL for (int v = 0; v < vectors; ++v) {
          _mm_prefetch(reinterpret_cast<const char*>(b.shortcut + to + p * b.C_out + v * 16), _MM_HINT_T1);
          if (apart) _mm_prefetch(reinterpret_cast<const char*>(b.out + to + p * b.C_out + v * 16), _MM_HINT_T1);
        }
      }
    }
    Vector acc[strips * size][vectors];
    const int64_t weight_vector = weight_words<T>(b.M, tap_count);
    const float* weight = words_of(b.conv2) + block16 * weight_vector;
    const bool last = block16 + vectors == b.C_out / 16;  // then comes the next chunk
    ahead.distance = last ? words_of(b.conv1) - weight : vectors * weight_vector;
    sum_channels<T, vectors, strips, size, planar>(acc, input, c.h.pixel(), c.h.channel(), taps, weight, weight_vector,
                                                   c.hidden.words.pieces, ahead);
    if (b.bias2) {
      Vector bias[vectors];
      UNROLL for (int v = 0; v < vectors; ++v) bias[v] = load16(b.bias2 + channel + v * 16);
      add_bias(acc, bias);
    }
    const Vector least = broadcast(least_of(b));
    UNROLL for (int q = 0; q < strips; ++q) {
      const T* shortcut = b.shortcut + places[q].to + channel;
      T* out = b.out + places[q].to + channel;
      UNROLL for (int p = 0; p < size; ++p) {
        if (p >= places[q].live) break;
        UNROLL for (int v = 0; v < vectors; ++v) {
          const int64_t to = p * b.C_out + v * 16;
          store16(out + to, at_least(least, add(load16(shortcut + to), acc[q * size + p][v])));
        }
      }
    }
  }
};

template <class T>
KERNEL Vector activate(const ResidualBlock<T>& b, const T* x, int64_t channel) {
  const Vector value = load16(x + channel);
  if (!b.scale1) return value;
  const Vector scale = load16(b.scale1 + channel), shift = load16(b.shift1 + channel);
  return relu(fma(value, scale, shift));
}

// One row of the input map, activated, into scratch.
template <class T>
void activate_row(const Chunk<T>& c, int64_t j, int64_t row) {
  const ResidualBlock<T>& b = c.block;
  const T* x = b.x + (b.route.order[c.start + j] * b.H + row) * b.W * b.C;
  float* a = c.a_of(j) + ((row + b.R / 2) * c.a.columns + b.S / 2) * c.a.pixel();
  if (!c.a.planar) {
    for (int64_t p = 0; p < b.W; ++p)
      for (int64_t k = 0; k < b.C; k += 16)
        store_words<T>(a + p * c.a.pixel() + k / per_word<T>, activate(b, x + p * b.C, k), 0xFFFF, 0xFFFF);
    return;
  }
  if constexpr (per_word<T> == 1) {
    for (int64_t p = 0; p < b.W; p += 16)
      for (int64_t k = 0; k < b.C; k += 16) {
        Vector tile[16];
        UNROLL for (int i = 0; i < 16; ++i) tile[i] = activate(b, x + (p + i) * b.C, k);
        transpose16(tile);
        UNROLL for (int i = 0; i < 16; ++i) store16(a + (k + i) * c.a.channel() + p, tile[i]);
      }
  }
}

KERNEL void clear(float* to, int64_t count) {
  for (; count >= 16; count -= 16, to += 16) store16(to, zeros());
  if (count) store16(to, zeros(), lanes_of(count));
}

// Zeros around a map: behind each of its rows, up to the next one.
void clear_border(const PaddedMap& m, float* data, int64_t top, int64_t left) {
  const int64_t planes = m.planar ? m.channels : 1, pixel = m.pixel(), row = m.columns * pixel, live = m.W * pixel;
  for (int64_t plane = 0; plane < planes; ++plane, data += m.rows * row) {
    float* at = data + top * row + left * pixel;
    clear(data, at - data);
    for (int64_t r = 1; r < m.H; ++r, at += row) clear(at + live, row - live);
    clear(at + live, data + m.rows * row - (at + live));
  }
}

template <class T>
void clear_maps(const Chunk<T>& c, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    clear_border(c.a, c.a_of(j), c.block.R / 2, c.block.S / 2);
    clear_border(c.h, c.h_of(j), c.block.R / 2, c.block.S / 2);
  }
}

using Planes = void (*)(const Chunk<float>&, int64_t j, const Piece&, int64_t v0, int64_t live, const int64_t* taps);
constexpr Planes hidden_planes_of[4] = {hidden_planes<1>, hidden_planes<2>, hidden_planes<3>, hidden_planes<4>};

// Items begin..end of a convolution to `blocks` blocks of channels: for each tile_vectors of these, each tile.
template <class Tile, class T>
void tile_items(const Chunk<T>& c, const PlacedTiles& placed, int64_t blocks, int64_t begin, int64_t end) {
  const int64_t count = static_cast<int64_t>(placed.tiles.size());
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block16 = i / count * tile_vectors, vectors = std::min<int64_t>(tile_vectors, blocks - block16);
    const PlacedTile& tile = placed.tiles[i % count];
    tile_of<Tile>(c.strips.size, vectors, tile.count)(c, block16, &placed.places[tile.first], tile.taps,
                                                      ahead_of(i % count, count));
  }
}

inline void plane_items(const Chunk<float>& c, int64_t begin, int64_t end, const int64_t* taps) {
  const int64_t count = c.vector_rows(), vectors = c.block.Ho * c.block.Wo / 16;
  for (int64_t i = begin; i < end; ++i) {
    const Piece& piece = c.fours[i / (count * c.count)];
    const int64_t v0 = i % count * 4, live = std::min<int64_t>(4, vectors - v0);
    hidden_planes_of[piece.width - 1](c, i / count % c.count, piece, v0, live, taps);
  }
}

template <class T>
void hidden_items(const Chunk<T>& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.a, taps);
  if constexpr (per_word<T> == 1) {
    if (c.h.planar) {
      plane_items(c, begin, end, taps);
      return;
    }
  }
  const int64_t blocks = static_cast<int64_t>(c.hidden.channels.blocks.size());
  tile_items<HiddenTile<T>>(c, hidden_tiles(c, taps), blocks, begin, end);
}

template <class T>
void output_items(const Chunk<T>& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.h, taps);
  if constexpr (per_word<T> == 1) {
    if (c.h.planar) {
      tile_items<OutputTile<T, true>>(c, output_tiles(c, taps), c.block.C_out / 16, begin, end);
      return;
    }
  }
  tile_items<OutputTile<T, false>>(c, output_tiles(c, taps), c.block.C_out / 16, begin, end);
}

#pragma GCC pop_options

template <class T>
Chunk<T> make_chunk(const ResidualBlock<T>& b, const Channels& stream, const Selected& hidden, int64_t start,
                    int64_t count, bool may_be_planar = true) {
  std::vector<Piece> fours = cut(hidden.channels.ranges, 4);
  // By pixels where pieces of 4 hidden channels waste less than blocks of 16.
  const int64_t hidden_blocks = static_cast<int64_t>(hidden.channels.blocks.size());
  const bool planar = may_be_planar && per_word<T> == 1 && b.stride == 1 && b.W % 16 == 0 &&
                      static_cast<int64_t>(fours.size()) < 4 * hidden_blocks;
  const Strips strips(count, b.Wo);
  const int64_t line = strips.count(1);
  const auto most = [&](int64_t blocks) {
    return strips_per_tile(strips.size, std::min<int64_t>(blocks, tile_vectors));
  };
  return {b,
          start,
          count,
          stream,
          hidden,
          std::move(fours),
          padded_map(b.H, b.W, b.C / per_word<T>, planar, b.R, b.S, b.stride),
          padded_map(b.Ho, b.Wo, hidden.words.count, planar, b.R, b.S, 1),
          strips,
          Cut::of(0, b.Ho, line, b.R, b.R / 2, b.H, b.stride, 1, most(hidden_blocks)),
          Cut::of(0, b.Ho, line, b.R, b.R / 2, b.Ho, 1, 1, most(b.C_out / 16)),
          nullptr};
}

template <class T>
void run_direct(const ResidualBlock<T>& b) {
  const Channels stream = in_words<T>(channels_of({{0, b.C}}, b.C, 16));
  std::map<const Channels*, Channels> words;  // a segment's selection in words
  run_block(b, 16, 1, [&](int64_t start, int64_t count, const Channels& hidden) {
    const auto found = words.find(&hidden);
    const Channels& of_hidden = found == words.end() ? words[&hidden] = in_words<T>(hidden) : found->second;
    return make_chunk<T>(b, stream, {hidden, of_hidden}, start, count);
  });
}

}  // namespace
}  // namespace den_kernels
