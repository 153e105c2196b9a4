// The block on weights as the parameters hold them, channels-last: of one convolution or both nothing is packed, so
// that a network that keeps its parameters needs no second copy of its large ones. Chunks, maps and stages are those of
// direct_residual.h; the inner loop is another: a register holds words of 16 input channels (with AVX2 8; of bfloat16
// 32), of weights and pixels alike, and four outputs of a few pixels are summed along them. Their lanes are added up at
// the end, which is what this costs.
#pragma once

#include "direct_residual.h"

namespace den_kernels {
namespace {

constexpr int tile_outputs = 4, tile_pixels = rows_pixels;
constexpr int64_t span =
    rows_span;  // words of input channels at a time: their weights of all taps stay in the inner caches
constexpr int64_t group_tiles = 48 / tile_pixels;  // tiles that read these weights one after the other

template <class T>
struct RowsChunk : Chunk<T> {
  std::vector<Piece> hiddens;   // hidden channels in fours, of whole words; place: in words
  std::vector<unsigned> lanes;  // those of each four that are selected
  std::vector<Piece> outputs;   // output channels of the block in fours
  Cut pixels1, pixels2;         // tiles of the pixels of both maps
  static int64_t groups(const Cut& cut) { return (cut.tiles() + group_tiles - 1) / group_tiles; }
  int64_t hidden_count() const {
    return this->block.scale2 ? static_cast<int64_t>(hiddens.size()) * groups(pixels1) : Chunk<T>::hidden_count();
  }
  int64_t output_count() const {
    return this->block.unpacked2 ? static_cast<int64_t>(outputs.size()) * groups(pixels2) : Chunk<T>::output_count();
  }
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// The pixels of a tile: instance, row and column of each; those beyond `live` repeat the last.
struct Pixels {
  int64_t instance[tile_pixels], row[tile_pixels], column[tile_pixels], live;
};
template <class T>
KERNEL Pixels pixels_at(const RowsChunk<T>& c, const Cut& cut, int64_t tile) {
  Pixels at;
  const TileStrips strips = cut.tile(tile);
  at.live = strips.count;
  const int64_t first = strips.before + strips.begin, W = c.block.Wo, line = first / W;
  int64_t column = first - line * W, row = line / c.count, instance = line - row * c.count;
  UNROLL for (int p = 0; p < tile_pixels; ++p) {
    at.instance[p] = instance, at.row[p] = row, at.column[p] = column;
    if (p + 1 >= at.live || ++column < W) continue;
    column = 0;
    if (++instance == c.count) instance = 0, ++row;
  }
  return at;
}

// A tile on its way: where its pixels begin on the map that is read, the taps that they meet, and sums by lanes.
struct RowsTile {
  Pixels at;
  const float* input[tile_pixels];
  Taps taps;
  Register sums[tile_outputs][tile_pixels];
};

// sums + a * b, of words of T.
template <class T>
KERNEL Register multiply_add_register(Register a, Register b, Register sum) {
  if constexpr (per_word<T> == 1)
    return fma_register(a, b, sum);
  else
    return multiply_add<T>(a, b, sum);
}

// sums[o][p] += weight[o][k] * input[p][k], lanes apart, over the words k of a register; `live` of them.
template <class T>
KERNEL void sum_register(Register (&sums)[tile_outputs][tile_pixels], const float* const (&input)[tile_pixels],
                         const float* const (&weight)[tile_outputs], int64_t live) {
  Register w[tile_outputs];
  UNROLL for (int o = 0; o < tile_outputs; ++o) w[o] = load_first(weight[o], live);
  UNROLL for (int p = 0; p < tile_pixels; ++p) {
    const Register x = load_first(input[p], live);
    UNROLL for (int o = 0; o < tile_outputs; ++o) sums[o][p] = multiply_add_register<T>(w[o], x, sums[o][p]);
  }
}

// A tile's sums over its taps and `width` words of channels: weight[o] and `place` are where these begin, of weights
// [outputs, taps, inputs] and on the map. Bits of `ahead`: outputs whose weights four outputs on are asked for.
template <class T>
KERNEL void sum_span(RowsTile& tile, const float* const (&weight)[tile_outputs], int64_t inputs, int64_t place,
                     int64_t width, int ahead) {
  Register sums[tile_outputs][tile_pixels];
  UNROLL for (int o = 0; o < tile_outputs; ++o) {
    UNROLL for (int p = 0; p < tile_pixels; ++p) sums[o][p] = tile.sums[o][p];
  }
  const int64_t distance = tile_outputs * tile.taps.count * inputs;
  for (int64_t t = tile.taps.begin; t < tile.taps.end; ++t) {
    const float *w[tile_outputs], *in[tile_pixels];
    UNROLL for (int o = 0; o < tile_outputs; ++o) {
      w[o] = weight[o] + t * inputs;
      for (int64_t k = 0; k < width && (ahead >> o & 1); k += 16)
        _mm_prefetch(reinterpret_cast<const char*>(w[o] + k + distance), _MM_HINT_T1);
    }
    UNROLL for (int p = 0; p < tile_pixels; ++p) in[p] = tile.input[p] + tile.taps.at[t] + place;
    for (const float* end = w[0] + width / register_lanes * register_lanes; w[0] != end;) {
      sum_register<T>(sums, in, w, register_lanes);
      UNROLL for (int o = 0; o < tile_outputs; ++o) w[o] += register_lanes;
      UNROLL for (int p = 0; p < tile_pixels; ++p) in[p] += register_lanes;
    }
    if (width % register_lanes) sum_register<T>(sums, in, w, width % register_lanes);
  }
  UNROLL for (int o = 0; o < tile_outputs; ++o) {
    UNROLL for (int p = 0; p < tile_pixels; ++p) tile.sums[o][p] = sums[o][p];
  }
}

// Items begin..end, each four outputs (a piece) of a group of tiles: sums over the channels of `ranges`, which are in
// words as `inputs` is, go to `store`.
// `input_of` an instance: its map, of which every `stride`-th pixel of a row and row are read.
template <class T, class Input, class Store>
KERNEL void sum_items(const RowsChunk<T>& c, const std::vector<Piece>& pieces, const Cut& cut, const float* weight,
                      int64_t inputs, const std::vector<Range>& ranges, const PaddedMap& map, int64_t stride,
                      int64_t begin, int64_t end, Input input_of, Store store) {
  int64_t offsets[max_taps];
  const int64_t taps = tap_offsets(c.block, map, offsets), groups = RowsChunk<T>::groups(cut), top = c.block.R / 2;
  RowsTile tiles[group_tiles];
  for (int64_t i = begin; i < end; ++i) {
    const Piece& piece = pieces[i / groups];
    int64_t first, last;
    share(cut.tiles(), i % groups, groups, first, last);
    for (int64_t j = first; j < last; ++j) {
      RowsTile& tile = tiles[j - first];
      tile.at = pixels_at(c, cut, j);
      tile.taps = taps_on_map(offsets, c.block.R, c.block.S, tile.at.row[0], tile.at.row[tile_pixels - 1], stride, 1,
                              top, top + map.H - 1);
      UNROLL for (int p = 0; p < tile_pixels; ++p) {
        tile.input[p] =
            input_of(tile.at.instance[p]) + (tile.at.row[p] * map.columns + tile.at.column[p]) * stride * map.pixel();
        UNROLL for (int o = 0; o < tile_outputs; ++o) tile.sums[o][p] = zero_register();
      }
    }
    const bool more = i / groups + 1 < static_cast<int64_t>(pieces.size());
    int64_t place = 0;
    for (const Range& range : ranges) {
      for (int64_t from = 0; from < range.width; from += span) {
        const float* rows[tile_outputs];
        UNROLL for (int o = 0; o < tile_outputs; ++o) {
          const int64_t output = piece.first + std::min<int64_t>(o, piece.width - 1);
          rows[o] = weight + output * taps * inputs + range.first + from;
        }
        for (int64_t j = first; j < last; ++j) {
          int ahead = 0;
          for (int64_t o = j; o < tile_outputs && more; o += cut.tiles()) ahead |= 1 << o;
          sum_span<T>(tiles[j - first], rows, inputs, place + from, std::min(range.width - from, span), ahead);
        }
      }
      place += range.width;
    }
    for (int64_t j = first; j < last; ++j) {
      const RowsTile& tile = tiles[j - first];
      UNROLL for (int p = 0; p < tile_pixels; ++p) {
        if (p >= tile.at.live) break;
        store(i / groups, tile.at, p, add_lanes(tile.sums[0][p], tile.sums[1][p], tile.sums[2][p], tile.sums[3][p]));
      }
    }
  }
}

// The `lanes` of four channels to a map of words, zeros in the others of a word; four values of a map of T.
KERNEL void store_four(float* to, __m128 v, int64_t width, unsigned, const float*) { store_quad(to, v, width); }
KERNEL __m128 load_four(const float* from) { return _mm_loadu_ps(from); }
KERNEL void store_four(float* to, __m128 v) { _mm_storeu_ps(to, v); }
#ifdef DEN_KERNELS_DOT_BF16
KERNEL __m128i rounded(__m128 v) { return (__m128i)_mm_cvtneps_pbh(v); }
KERNEL __m128 load_four(const bf16* from) {
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return _mm_castsi128_ps(_mm_slli_epi32(words, 16));
}
KERNEL void store_four(bf16* to, __m128 v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), rounded(v)); }
KERNEL void store_four(float* to, __m128 v, int64_t width, unsigned lanes, const bf16*) {
  const __m128i kept = rounded(_mm_maskz_mov_ps(static_cast<__mmask8>(lanes), v));
  width == 4 ? _mm_storel_epi64(reinterpret_cast<__m128i*>(to), kept) : _mm_storeu_si32(to, kept);
}
#endif

// relu(scale2 * conv1 + bias1) into the hidden map.
template <class T>
void hidden_items(const RowsChunk<T>& c, int64_t begin, int64_t end) {
  const ResidualBlock<T>& b = c.block;
  if (!b.scale2) return hidden_items(static_cast<const Chunk<T>&>(c), begin, end);
  const auto store = [&](int64_t n, const Pixels& at, int p, __m128 sum) {
    const Piece& piece = c.hiddens[n];
    const __m128 value = _mm_fmadd_ps(load_quad(b.scale2 + piece.first, piece.width), sum,
                                      load_quad(b.bias1 + piece.first, piece.width));
    float* h = c.h_of(at.instance[p]) + ((at.row[p] + b.R / 2) * c.h.columns + at.column[p] + b.S / 2) * c.h.pixel() +
               piece.place;
    store_four(h, _mm_max_ps(_mm_setzero_ps(), value), piece.width, c.lanes[n], b.x);
  };
  sum_items(
      c, c.hiddens, c.pixels1, words_of(b.conv1), b.C / per_word<T>, c.stream.ranges, c.a, b.stride, begin, end,
      [&](int64_t j) { return c.a_of(j); }, store);
}

// shortcut + conv2 + bias2 of the block's output.
template <class T>
void output_items(const RowsChunk<T>& c, int64_t begin, int64_t end) {
  const ResidualBlock<T>& b = c.block;
  if (!b.unpacked2) return output_items(static_cast<const Chunk<T>&>(c), begin, end);
  const __m128 least = _mm_set1_ps(least_of(b));
  const auto store = [&](int64_t n, const Pixels& at, int p, __m128 sum) {
    const Piece& piece = c.outputs[n];
    const int64_t row = b.route.order[c.start + at.instance[p]] * b.Ho + at.row[p];
    const int64_t to = (row * b.Wo + at.column[p]) * b.C_out + piece.first;
    if (b.bias2) sum = _mm_add_ps(sum, _mm_loadu_ps(b.bias2 + piece.first));
    store_four(b.out + to, _mm_max_ps(least, _mm_add_ps(load_four(b.shortcut + to), sum)));
  };
  sum_items(
      c, c.outputs, c.pixels2, words_of(b.conv2), b.M / per_word<T>, c.hidden.words.ranges, c.h, 1, begin, end,
      [&](int64_t j) { return c.h_of(j); }, store);
}

#pragma GCC pop_options

// The fours of a chunk's hidden channels, and which of each are selected.
template <class T>
void find_hiddens(RowsChunk<T>& c) {
  for (const Piece& words : cut(c.hidden.words.ranges, 4 / per_word<T>)) {
    const Piece four{words.first * per_word<T>, words.width * per_word<T>, words.place};
    unsigned lanes = 0;
    for (const Range& range : c.hidden.channels.ranges)
      for (int64_t k = 0; k < four.width; ++k) {
        const int64_t channel = four.first + k;
        if (range.first <= channel && channel < range.first + range.width) lanes |= 1u << k;
      }
    c.hiddens.push_back(four);
    c.lanes.push_back(lanes);
  }
}

template <class T>
void run_rows(const ResidualBlock<T>& b) {
  const Channels stream = in_words<T>(channels_of({{0, b.C}}, b.C, 16));
  std::map<const Channels*, Channels> words;  // a segment's selection in words
  run_block(b, 16, 1, [&](int64_t start, int64_t count, const Channels& hidden) {
    const auto found = words.find(&hidden);
    const Channels& of_hidden = found == words.end() ? words[&hidden] = in_words<T>(hidden) : found->second;
    const auto pixels = [&](int64_t H, int64_t stride) {
      return Cut::of(0, b.Ho, count * b.Wo, b.R, b.R / 2, H, stride, 1, tile_pixels);
    };
    RowsChunk<T> made{make_chunk<T>(b, stream, {hidden, of_hidden}, start, count, false),
                      {},
                      {},
                      cut({{0, b.C_out}}, tile_outputs),
                      pixels(b.H, b.stride),
                      pixels(b.Ho, 1)};
    find_hiddens(made);
    return made;
  });
}

}  // namespace
}  // namespace den_kernels
