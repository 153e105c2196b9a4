// The weight gradient. Of a band (conv_bands.h), a tile is 32 outputs x 8 inputs of one tap, or 16 x 16 (with AVX2 16 x
// 6), summed over the pixels in registers: a vector holds 16 outputs of a pixel's gradient, input values are broadcast.
// The gradients of a tile's pixels are copied side by side first: they serve every input and tap. In bfloat16 a word
// holds two neighbouring pixels of a row, of gradients and inputs (gradient_map.h) alike, and the products of both are
// added at once; sums are float32, rounded when all are added up. 32 x 8 take 10 loads for 16 products of vectors, 16 x
// 16 take 17: the products are what bounds them, in either type.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_gradient.h"
#include "gradient_map.h"

namespace den_kernels {
namespace {

template <class T>
using Arguments = ConvArguments<T>;
template <class T>
using Map = GradientMap<T>;

// Words of pixels at a time at most: their gradients of 32 outputs and inputs of one piece stay in the first level.
constexpr int64_t pixels_at_once = 128;

// Words of pixels whose products are added up before they go to the sums of all: in float32 of few pixels fewer,
// because the parts make most of the rounding errors then; of many, short parts only cost time.
template <class T>
int64_t part_words(const Arguments<T>& p) {
  const int64_t pixels = p.B * p.Ho * p.Wo;
  return per_word<T> > 1 || pixels > 1024 ? pixels_at_once : pixels <= 256 ? 32 : 64;
}

// Where some pixels of a band lie, in words of one or two: gradients from the batch's first, inputs from the scratch
// memory's first.
struct Pixels {
  int64_t count, grad[pixels_at_once], input[pixels_at_once];
  bool alone[pixels_at_once];  // bfloat16: no second pixel
};

// The gradients of 16 or 32 outputs at some pixels, zeros where an output is not selected.
struct Panel {
  alignas(64) float values[pixels_at_once * 32];
};

template <class T>
Pixels pixels_of(const Arguments<T>& p, const Band& band, const Map<T>& map, int64_t first) {
  const int64_t per_row = words_of_row(p), per_instance = band.rows * per_row;
  Pixels made{std::min(part_words(p), band.count * per_instance - first), {}, {}, {}};
  int64_t j = first / per_instance, row = first % per_instance / per_row, word = first % per_row;
  for (int64_t i = 0; i < made.count; ++i) {
    const int64_t column = word * per_word<T>;
    made.grad[i] = ((p.route.order[band.start + j] * p.Ho + band.first_row + row) * p.Wo + column) * p.C_out;
    made.input[i] = j * map.size() + (row * p.stride[0] * map.columns + map.column(p, word)) * map.pixel;
    made.alone[i] = column + per_word<T> > p.Wo;
    if (++word < per_row) continue;
    word = 0;
    if (++row < band.rows) continue;
    row = 0;
    ++j;
  }
  return made;
}

#pragma GCC push_options
DEN_KERNELS_TARGET

// next: values from a pixel to its neighbour.
template <class T, int vectors>
void fill(Panel& panel, const Pixels& pixels, const T* grad, int64_t next, const Block* block) {
  for (int64_t i = 0; i < pixels.count; ++i) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      const Lanes lanes = static_cast<Lanes>(block[v].lanes), none = 0;
      const T* from = grad + pixels.grad[i] + block[v].index * 16;
      store16(panel.values + (i * vectors + v) * 16, load_word<T>(from, lanes, next, pixels.alone[i] ? none : lanes));
    }
  }
}

// sums[v][k] += sum over pixels of panel[v] * x[k]; sums[v]: [inputs][16], `step` floats from block 0's to block 1's.
// The pixels are summed up from zero: one long sum over all pixels of a batch would round away ten times as much.
template <class T, int vectors, int inputs>
void gradient_tile(const Pixels& pixels, const Panel& panel, const float* x, float* sums, int64_t step) {
  Vector acc[inputs][vectors];
  UNROLL for (int k = 0; k < inputs; ++k) { UNROLL for (int v = 0; v < vectors; ++v) acc[k][v] = zeros(); }
  const float* g = panel.values;
  for (int64_t i = 0; i < pixels.count; ++i, g += vectors * 16) {
    const float* in = x + pixels.input[i];
    Vector gv[vectors];
    UNROLL for (int v = 0; v < vectors; ++v) gv[v] = load16(g + v * 16);
    UNROLL for (int k = 0; k < inputs; ++k) {
      const Vector value = broadcast(in[k]);
      UNROLL for (int v = 0; v < vectors; ++v) acc[k][v] = multiply_add<T>(value, gv[v], acc[k][v]);
    }
  }
  UNROLL for (int k = 0; k < inputs; ++k) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      float* to = sums + v * step + k * 16;
      store16(to, add(load16(to), acc[k][v]));
    }
  }
}

using Tile = void (*)(const Pixels&, const Panel&, const float*, float*, int64_t);

template <class T, int vectors, int... fewer>
constexpr std::array<Tile, sizeof...(fewer)> tiles_by_inputs(std::integer_sequence<int, fewer...>) {
  return {gradient_tile<T, vectors, fewer + 1>...};
}
template <class T, int vectors>
constexpr auto tiles_of = tiles_by_inputs<T, vectors>(std::make_integer_sequence<int, gradient_inputs(vectors)>{});

template <class T>
void add_band(const Arguments<T>& p, const T* grad, const Band& band, float* scratch, float* sums) {
  const Map<T> map(p, band);
  const int64_t tap_count = p.R * p.S, inputs = sum_inputs(p);
  int64_t taps[max_taps];
  map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count; ++j) copy_inputs(p, band, map, j, scratch + j * map.size());
  const std::vector<Piece> of_one = cut(band.inputs.ranges, gradient_inputs(1)),
                           of_two = cut(band.inputs.ranges, gradient_inputs(tile_vectors));
  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  Panel panel;
  for (int64_t first = 0; first < band.count * band.rows * words_of_row(p); first += part_words(p)) {
    const Pixels pixels = pixels_of(p, band, map, first);
    for (int64_t n = 0; n < block_count; n += tile_vectors) {
      const bool two = tile_vectors > 1 && n + 1 < block_count;
      const Block* block = &blocks[n];
      const int64_t step = two ? (block[1].index - block[0].index) * tap_count * inputs * 16 : 0;
      (two ? fill<T, tile_vectors> : fill<T, 1>)(panel, pixels, grad, p.C_out, block);
      for (const Piece& piece : two ? of_two : of_one)
        for (int64_t t = 0; t < tap_count; ++t) {
          float* to = sums + ((block->index * tap_count + t) * inputs + piece.first) * 16;
          const Tile run = two ? tiles_of<T, tile_vectors>[piece.width - 1] : tiles_of<T, 1>[piece.width - 1];
          run(pixels, panel, scratch + taps[t] + piece.place, to, step);
        }
    }
  }
}

#pragma GCC pop_options

template <class T>
void run_weight_gradient(const Arguments<T>& p, const T* grad, T* dweight) {
  const auto bytes_of = [&p](const Band& band) { return band.count * Map<T>(p, band).size() * 4; };
  sum_bands(p, 16, dweight, bytes_of,
            [&](const Band& band, float* scratch, float* sums) { add_band(p, grad, band, scratch, sums); });
}

}  // namespace
}  // namespace den_kernels
