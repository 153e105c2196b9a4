// How it goes: a chunk of instances of one level is taken by a thread (or, when there are fewer instances than threads
// can share, by all threads together). bn1 and ReLU write the padded input map into scratch memory, conv1 writes the
// padded hidden map beside it, conv2 adds its sums into the residual stream. Both maps stay in the core's cache; of
// main memory only the residual stream is touched, once. Of the two inner loops (direct_tiles.h) the one by output
// channels is the rule; conv1 goes by pixels for widths that would leave its lanes empty (4, 8 hidden channels), on
// maps 16 pixels wide or more. Maps are [pixel][channel] for the first and [channel][pixel] for the second; conv2 reads
// either.
#include "dynamic_residual.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "amx_pack.h"
#include "direct_chunks.h"
#include "dispatch.h"

#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_tiles.h"
#endif

namespace den_kernels {

void pack_weights(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t o = 0; o < O_blocks; ++o)
    for (int64_t i = 0; i < I_blocks; ++i) {
      const int64_t outputs = std::min<int64_t>(16, O - o * 16), inputs = std::min<int64_t>(16, I - i * 16);
      for (int64_t t = 0; t < taps; ++t) {
        float* to = packed + ((o * I_blocks + i) * taps + t) * 256;
        const float* from = weight + (o * 16 * taps + t) * I + i * 16;
        std::fill_n(to, 256, 0.f);
        for (int64_t q = 0; q < outputs; ++q)
          for (int64_t k = 0; k < inputs; ++k)
            to[k * 16 + q] = from[q * taps * I + k] * (scale ? scale[o * 16 + q] : 1.f);
      }
    }
}

#ifdef DEN_KERNELS_HAS_AVX512
namespace {

constexpr int quads_per_tile = 3;  // of four pixels: with two vectors of channels, 24 of 32 registers sum

// A zero-padded map in scratch memory, wide enough for whole quads of the convolution that reads it.
struct PaddedMap {
  int64_t H, W, rows, columns, channels;
  bool planar;  // [channel][pixel] instead of [pixel][channel]
  int64_t pixel() const { return planar ? 1 : channels; }
  int64_t channel() const { return planar ? rows * columns : 1; }
  int64_t size() const { return rows * columns * channels; }
};

PaddedMap padded_map(int64_t H, int64_t W, int64_t channels, bool planar, int64_t R, int64_t S, int64_t stride) {
  const int64_t Wo = (W + stride - 1) / stride;
  const int64_t read = (round_up(Wo, 4) - 1) * stride + S, padded = W + S - 1;
  return {H, W, H + R - 1, read > padded ? read : padded, channels, planar};
}

// What the two convolutions of one chunk share.
struct Chunk {
  const ResidualBlock<float>& block;
  int64_t start, count;
  const Channels &stream, &hidden;
  std::vector<Piece> fours;  // of the hidden channels, for planar maps
  PaddedMap a, h;
  float* scratch;
  float* a_of(int64_t j) const { return scratch + j * (a.size() + h.size()); }
  float* h_of(int64_t j) const { return a_of(j) + a.size(); }
  int64_t bytes() const { return count * (a.size() + h.size()) * 4; }
  int64_t quads() const { return count * block.Ho * ((block.Wo + 3) / 4); }
  int64_t tiles() const { return (quads() + quads_per_tile - 1) / quads_per_tile; }
  int64_t hidden_blocks() const {
    return static_cast<int64_t>(h.planar ? fours.size() : (hidden.blocks.size() + 1) / 2);
  }
  int64_t hidden_count() const { return hidden_blocks() * (h.planar ? count * vector_rows() : tiles()); }
  int64_t output_count() const { return (block.C_out / 16 + 1) / 2 * tiles(); }
  int64_t vector_rows() const { return (block.Ho * block.Wo / 16 + 3) / 4; }  // tiles of four vectors of 16 pixels
};

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")

// Where tap (r, s) lies from tap (0, 0) in a map.
KERNEL int64_t tap_offsets(const ResidualBlock<float>& b, const PaddedMap& map, int64_t* taps) {
  for (int64_t r = 0; r < b.R; ++r)
    for (int64_t s = 0; s < b.S; ++s) taps[r * b.S + s] = (r * map.columns + s) * map.pixel();
  return b.R * b.S;
}

// Output pixels of quad q of a chunk: instance, row, first column, and how many of the four lie on the map.
struct Quad {
  int64_t instance, row, column, live;
};
KERNEL Quad quad_at(const ResidualBlock<float>& b, int64_t q) {
  const int64_t per_row = (b.Wo + 3) / 4, row = q / per_row, column = (q - row * per_row) * 4, instance = row / b.Ho;
  return {instance, row - instance * b.Ho, column, b.Wo - column < 4 ? b.Wo - column : 4};
}

// One tile of conv1, blocks slot and on of the hidden channels: relu(sum + bias) into the hidden map, [pixel][channel].
template <int vectors, int quads>
void hidden_tile(const Chunk& c, int64_t slot, int64_t q0, const int64_t* taps, Ahead ahead) {
  const ResidualBlock<float>& b = c.block;
  const Block* block = &c.hidden.blocks[slot];
  const int64_t tap_count = b.R * b.S;
  const float* input[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    input[q] = c.a_of(at.instance) + (at.row * b.stride * c.a.columns + at.column * b.stride) * c.a.pixel();
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __m512 bias = _mm512_maskz_loadu_ps(static_cast<__mmask16>(block[v].lanes), b.bias1 + block[v].index * 16);
    UNROLL for (int p = 0; p < quads * 4; ++p) acc[p][v] = bias;
  }
  const int64_t weight_vector = round_up(b.C, 16) * tap_count * 16;
  if (ahead.count) ahead.distance = (block[vectors].index - block[0].index) * weight_vector;
  sum_channels<vectors, quads, false>(
      acc, input, c.a.pixel() * b.stride, 1, taps, tap_count, b.conv1 + block[0].index * weight_vector,
      (block[vectors - 1].index - block[0].index) * weight_vector, c.stream.pieces, ahead);
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    float* h = c.h_of(at.instance) + ((at.row + b.R / 2) * c.h.columns + at.column + b.S / 2) * c.h.pixel();
    UNROLL for (int p = 0; p < 4; ++p) {
      if (p >= at.live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        const __mmask16 lanes = static_cast<__mmask16>(block[v].lanes);
        const __m512 value = _mm512_max_ps(_mm512_setzero_ps(), acc[q * 4 + p][v]);
        _mm512_mask_storeu_ps(h + p * c.h.pixel() + block[v].place, static_cast<__mmask16>(_pext_u32(lanes, lanes)),
                              _mm512_maskz_compress_ps(lanes, value));
      }
    }
  }
}

// One tile of conv1 by pixels: the hidden channels of a piece, four vectors of 16 pixels, into the planar hidden map.
template <int outputs>
void hidden_planes(const Chunk& c, int64_t j, const Piece& piece, int64_t v0, int64_t live, const int64_t* taps) {
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, per_row = b.Wo / 16;
  const float* input[4];
  UNROLL for (int v = 0; v < 4; ++v) {
    const int64_t at = v0 + (v < live ? v : 0);
    input[v] = c.a_of(j) + at / per_row * c.a.columns + at % per_row * 16;
  }
  __m512 acc[outputs][4];
  UNROLL for (int o = 0; o < outputs; ++o) {
    UNROLL for (int v = 0; v < 4; ++v) acc[o][v] = _mm512_set1_ps(b.bias1[piece.first + o]);
  }
  const float* weight = b.conv1 + piece.first / 16 * round_up(b.C, 16) * tap_count * 16 + piece.first % 16;
  sum_pixels<outputs, 4>(acc, input, c.a.channel(), taps, tap_count, weight, c.stream.pieces);
  UNROLL for (int v = 0; v < 4; ++v) {
    if (v >= live) break;
    const int64_t row = (v0 + v) / per_row + b.R / 2, column = (v0 + v) % per_row * 16 + b.S / 2;
    UNROLL for (int o = 0; o < outputs; ++o)
        _mm512_storeu_ps(c.h_of(j) + (piece.place + o) * c.h.channel() + row * c.h.columns + column,
                         _mm512_max_ps(_mm512_setzero_ps(), acc[o][v]));
  }
}

// One tile of conv2: sums added to the shortcut.
template <int vectors, int quads, bool planar>
void output_tile(const Chunk& c, int64_t block16, int64_t q0, const int64_t* taps, Ahead ahead) {
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, channel = block16 * 16;
  const float* input[quads];
  const float* shortcut[quads];
  float* out[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    input[q] = c.h_of(at.instance) + (at.row * c.h.columns + at.column) * c.h.pixel();
    const int64_t pixel = (b.route.order[c.start + at.instance] * b.Ho + at.row) * b.Wo + at.column;
    shortcut[q] = b.shortcut + pixel * b.C_out + channel;
    out[q] = b.out + pixel * b.C_out + channel;
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __m512 bias = b.bias2 ? _mm512_loadu_ps(b.bias2 + channel + v * 16) : _mm512_setzero_ps();
    UNROLL for (int p = 0; p < quads * 4; ++p) acc[p][v] = bias;
  }
  const int64_t weight_vector = round_up(b.M, 16) * tap_count * 16;
  ahead.distance = vectors * weight_vector;
  sum_channels<vectors, quads, planar>(acc, input, c.h.pixel(), c.h.channel(), taps, tap_count,
                                       b.conv2 + block16 * weight_vector, weight_vector, c.hidden.pieces, ahead);
  UNROLL for (int q = 0; q < quads; ++q) {
    const int64_t live = quad_at(b, q0 + q).live;
    UNROLL for (int p = 0; p < 4; ++p) {
      if (p >= live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        const int64_t at = p * b.C_out + v * 16;
        _mm512_storeu_ps(out[q] + at, _mm512_add_ps(_mm512_loadu_ps(shortcut[q] + at), acc[q * 4 + p][v]));
      }
    }
  }
}

KERNEL __m512 activate(const ResidualBlock<float>& b, const float* x, int64_t channel) {
  const __m512 value = _mm512_loadu_ps(x + channel);
  if (!b.scale1) return value;
  const __m512 scale = _mm512_loadu_ps(b.scale1 + channel), shift = _mm512_loadu_ps(b.shift1 + channel);
  return _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(value, scale, shift));
}

// One row of the input map, activated, into scratch.
void activate_row(const Chunk& c, int64_t j, int64_t row) {
  const ResidualBlock<float>& b = c.block;
  const float* x = b.x + (b.route.order[c.start + j] * b.H + row) * b.W * b.C;
  float* a = c.a_of(j) + ((row + b.R / 2) * c.a.columns + b.S / 2) * c.a.pixel();
  if (!c.a.planar) {
    for (int64_t p = 0; p < b.W; ++p)
      for (int64_t k = 0; k < b.C; k += 16) _mm512_storeu_ps(a + p * c.a.pixel() + k, activate(b, x + p * b.C, k));
    return;
  }
  for (int64_t p = 0; p < b.W; p += 16)
    for (int64_t k = 0; k < b.C; k += 16) {
      __m512 tile[16];
      UNROLL for (int i = 0; i < 16; ++i) tile[i] = activate(b, x + (p + i) * b.C, k);
      transpose16(tile);
      UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_ps(a + (k + i) * c.a.channel() + p, tile[i]);
    }
}

// Zeros around a map.
void clear_border(const PaddedMap& m, float* data, int64_t top, int64_t left) {
  const int64_t planes = m.planar ? m.channels : 1, run = m.pixel();
  for (int64_t plane = 0; plane < planes; ++plane) {
    float* map = data + plane * m.rows * m.columns;
    for (int64_t r = 0; r < m.rows; ++r) {
      float* row = map + r * m.columns * run;
      const bool inside = r >= top && r < top + m.H;
      for (int64_t i = 0; i < (inside ? left : m.columns) * run; ++i) row[i] = 0.f;
      for (int64_t i = (left + m.W) * run; inside && i < m.columns * run; ++i) row[i] = 0.f;
    }
  }
}

void clear_maps(const Chunk& c, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    clear_border(c.a, c.a_of(j), c.block.R / 2, c.block.S / 2);
    clear_border(c.h, c.h_of(j), c.block.R / 2, c.block.S / 2);
  }
}

using Planes = void (*)(const Chunk&, int64_t j, const Piece&, int64_t v0, int64_t live, const int64_t* taps);
using Tile = void (*)(const Chunk&, int64_t block16, int64_t q0, const int64_t* taps, Ahead);

constexpr Planes hidden_planes_of[4] = {hidden_planes<1>, hidden_planes<2>, hidden_planes<3>, hidden_planes<4>};

// By how many vectors and quads they take, from one.
constexpr Tile hidden_tiles[2][3] = {{hidden_tile<1, 1>, hidden_tile<1, 2>, hidden_tile<1, 3>},
                                     {hidden_tile<2, 1>, hidden_tile<2, 2>, hidden_tile<2, 3>}};

template <bool planar>
constexpr Tile output_tiles[2][3] = {{output_tile<1, 1, planar>, output_tile<1, 2, planar>, output_tile<1, 3, planar>},
                                     {output_tile<2, 1, planar>, output_tile<2, 2, planar>, output_tile<2, 3, planar>}};

// Items begin..end of a convolution to `blocks` blocks of channels: for each two of these, each tile.
void tile_items(const Chunk& c, const Tile (&tiles)[2][3], int64_t blocks, int64_t begin, int64_t end,
                const int64_t* taps) {
  const int64_t count = c.tiles();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block16 = i / count * 2, q0 = i % count * quads_per_tile;
    const int64_t vectors = std::min<int64_t>(2, blocks - block16);
    const Ahead ahead = block16 + 2 < blocks ? ahead_of(i % count, count) : Ahead{};
    tiles[vectors - 1][std::min<int64_t>(quads_per_tile, c.quads() - q0) - 1](c, block16, q0, taps, ahead);
  }
}

void hidden_items(const Chunk& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.a, taps);
  if (!c.h.planar) {
    tile_items(c, hidden_tiles, static_cast<int64_t>(c.hidden.blocks.size()), begin, end, taps);
    return;
  }
  const int64_t count = c.vector_rows(), vectors = c.block.Ho * c.block.Wo / 16;
  for (int64_t i = begin; i < end; ++i) {
    const Piece& piece = c.fours[i / (count * c.count)];
    const int64_t v0 = i % count * 4, live = std::min<int64_t>(4, vectors - v0);
    hidden_planes_of[piece.width - 1](c, i / count % c.count, piece, v0, live, taps);
  }
}

void output_items(const Chunk& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.h, taps);
  tile_items(c, c.h.planar ? output_tiles<true> : output_tiles<false>, c.block.C_out / 16, begin, end, taps);
}

#pragma GCC pop_options

Chunk make_chunk(const ResidualBlock<float>& b, const Channels& stream, const Channels& hidden, int64_t start,
                 int64_t count) {
  std::vector<Piece> fours = cut(hidden.runs, 4);
  // By pixels where pieces of 4 hidden channels waste less than blocks of 16.
  const bool planar = b.stride == 1 && b.W % 16 == 0 && fours.size() < 4 * hidden.blocks.size();
  return {b,
          start,
          count,
          stream,
          hidden,
          std::move(fours),
          padded_map(b.H, b.W, b.C, planar, b.R, b.S, b.stride),
          padded_map(b.Ho, b.Wo, hidden.count, planar, b.R, b.S, 1),
          nullptr};
}

}  // namespace

bool has_dynamic_residual() { return DEN_KERNELS_HAS_AVX512; }

void dynamic_residual(const ResidualBlock<float>& b) {
  const Channels stream = channels_of({{0, b.C}}, b.C, 16);
  run_block(b, 16, 1, [&](int64_t start, int64_t count, const Channels& hidden) {
    return make_chunk(b, stream, hidden, start, count);
  });
}

#else

bool has_dynamic_residual() { return false; }

void dynamic_residual(const ResidualBlock<float>&) {
  throw std::runtime_error("dynamic_residual: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
