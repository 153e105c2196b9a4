// The weight gradient in float32. Of a band (conv_bands.h), a tile is 32 outputs x 8 inputs of one tap (with AVX2 16 x
// 6), summed over the pixels in registers: a vector holds 16 outputs of a pixel's gradient, input values are broadcast.
// The gradients of a tile's pixels are copied side by side first: they serve every input and tap.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "band_map.h"
#include "conv_gradient.h"

namespace den_kernels {
namespace {

using Arguments = ConvArguments<float>;
using Map = BandMap<float>;

constexpr int64_t pixels_at_once = 128;

// Pixels whose products are added up before they go to the sums of all: of few pixels fewer, because the parts make
// most of the rounding errors then; of many, short parts only cost time.
int64_t part_pixels(const Arguments& p) {
  const int64_t pixels = p.B * p.Ho * p.Wo;
  return pixels <= 256 ? 32 : pixels <= 1024 ? 64 : pixels_at_once;
}

// Where some pixels of a band lie: gradients from the batch's first, inputs from the scratch memory's first.
struct Pixels {
  int64_t count, grad[pixels_at_once], input[pixels_at_once];
};

// The gradients of 16 or 32 outputs at some pixels, zeros where an output is not selected.
struct Panel {
  alignas(64) float values[pixels_at_once * 32];
};

Pixels pixels_of(const Arguments& p, const Band& band, const Map& map, int64_t first) {
  const int64_t per_instance = band.rows * p.Wo;
  Pixels made{std::min(part_pixels(p), band.count * per_instance - first), {}, {}};
  int64_t j = first / per_instance, row = first % per_instance / p.Wo, column = first % p.Wo;
  for (int64_t i = 0; i < made.count; ++i) {
    made.grad[i] = ((p.route.order[band.start + j] * p.Ho + band.first_row + row) * p.Wo + column) * p.C_out;
    made.input[i] = j * map.size() + (row * p.stride[0] * map.columns + column * p.stride[1]) * map.pixel;
    if (++column < p.Wo) continue;
    column = 0;
    if (++row < band.rows) continue;
    row = 0;
    ++j;
  }
  return made;
}

#pragma GCC push_options
DEN_KERNELS_TARGET

template <int vectors>
void fill(Panel& panel, const Pixels& pixels, const float* grad, const Block* block) {
  for (int64_t i = 0; i < pixels.count; ++i) {
    UNROLL for (int v = 0; v < vectors; ++v) {
      const Vector of_block = load16(grad + pixels.grad[i] + block[v].index * 16, static_cast<Lanes>(block[v].lanes));
      store16(panel.values + (i * vectors + v) * 16, of_block);
    }
  }
}

// sums[v][k] += sum over pixels of panel[v] * x[k]; sums[v]: [inputs][16], `step` floats from block 0's to block 1's.
// The pixels are summed up from zero: one long sum over all pixels of a batch would round away ten times as much.
template <int vectors, int inputs>
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
      UNROLL for (int v = 0; v < vectors; ++v) acc[k][v] = fma(value, gv[v], acc[k][v]);
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

template <int vectors, int... fewer>
constexpr std::array<Tile, gradient_inputs> tiles_by_inputs(std::integer_sequence<int, fewer...>) {
  return {gradient_tile<vectors, fewer + 1>...};
}
template <int vectors>
constexpr auto tiles_of = tiles_by_inputs<vectors>(std::make_integer_sequence<int, gradient_inputs>{});

void add_band(const Arguments& p, const float* grad, const Band& band, float* scratch, float* sums) {
  const Map map(p, band, band.inputs.count);
  const int64_t tap_count = p.R * p.S, inputs = sum_inputs(p);
  int64_t taps[max_taps];
  map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count; ++j) copy_rows(p, band, band.inputs, map, j, scratch + j * map.size());
  const std::vector<Piece> pieces = cut(band.inputs.ranges, gradient_inputs);
  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  Panel panel;
  for (int64_t first = 0; first < band.count * band.rows * p.Wo; first += part_pixels(p)) {
    const Pixels pixels = pixels_of(p, band, map, first);
    for (int64_t n = 0; n < block_count; n += tile_vectors) {
      const bool two = tile_vectors > 1 && n + 1 < block_count;
      const Block* block = &blocks[n];
      const int64_t step = two ? (block[1].index - block[0].index) * tap_count * inputs * 16 : 0;
      (two ? fill<tile_vectors> : fill<1>)(panel, pixels, grad, block);
      for (const Piece& piece : pieces)
        for (int64_t t = 0; t < tap_count; ++t) {
          float* to = sums + ((block->index * tap_count + t) * inputs + piece.first) * 16;
          const Tile run = two ? tiles_of<tile_vectors>[piece.width - 1] : tiles_of<1>[piece.width - 1];
          run(pixels, panel, scratch + taps[t] + piece.place, to, step);
        }
    }
  }
}

#pragma GCC pop_options

void run_weight_gradient(const Arguments& p, const float* grad, float* dweight) {
  const auto bytes_of = [&p](const Band& band) { return band.count * Map(p, band, band.inputs.count).size() * 4; };
  sum_bands(p, 16, dweight, bytes_of,
            [&](const Band& band, float* scratch, float* sums) { add_band(p, grad, band, scratch, sums); });
}

}  // namespace
}  // namespace den_kernels
