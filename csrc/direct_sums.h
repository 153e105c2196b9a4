// Tiles of strips whose sums go to a function: what the blocks of several convolutions have in common.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_tiles.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// The blocks of output channels block[0 .. vectors - 1] of some strips, and their inputs: where the strips begin,
// floats from a pixel to the next, the taps and the channels.
struct Inputs {
  const float* at[most_strips];
  int64_t pixel;
  Taps taps;
  const std::vector<Piece>& pieces;
  const float* weight;
  int64_t weight_vector;
};

// The sums of a tile, each pixel's to finish(strip, pixel, sums of its vectors). It is copied: of memory that a store
// may change, all would be read anew for every pixel.
template <class Finish>
struct SumTile : UsualTile {
  template <int vectors, int strips, int size>
  static void run(const Inputs& in, const Vector (&bias)[2], const Finish& finish) {
    const float* input[strips];
    UNROLL for (int q = 0; q < strips; ++q) input[q] = in.at[q];
    Vector acc[strips * size][vectors], own_bias[vectors];
    sum_channels<float, vectors, strips, size, false>(acc, input, in.pixel, 1, in.taps, in.weight, in.weight_vector,
                                                      in.pieces, {});
    UNROLL for (int v = 0; v < vectors; ++v) own_bias[v] = bias[v];
    add_bias(acc, own_bias);
    const Finish own = finish;
    UNROLL for (int q = 0; q < strips; ++q) { UNROLL for (int i = 0; i < size; ++i) own(q, i, acc[q * size + i]); }
  }
};

template <class Finish>
void sum_strips(int64_t size, int64_t strips, int64_t vectors, const Inputs& in, const Vector (&bias)[2],
                const Finish& finish) {
  tile_of<SumTile<Finish>>(size, vectors, strips)(in, bias, finish);
}

// The bias of one or two blocks.
KERNEL void load_bias(const float* from, const Block* block, int64_t vectors, Vector (&bias)[2]) {
  for (int64_t v = 0; v < vectors; ++v)
    bias[v] = load16(from + block[v].index * 16, static_cast<Lanes>(block[v].lanes));
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
