// Squeeze and excitation of an inverted residual: from the sums of an instance's rows to a factor for each channel.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_activation.h"
#include "direct_tiles.h"
#include "inverted_chunk.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// activation(weight * from + bias) of the output block `index`: weight [., I] by pack_weights, inputs as in pieces.
void product(const float* weight, int64_t index, int64_t I, const float* bias, Lanes lanes, Activation activation,
             const float* from, const std::vector<Piece>& pieces, float* to) {
  Vector sum = load16(bias + index * 16, lanes);
  const float* own = weight + index * weight_words<float>(I, 1);
  for (const Piece& piece : pieces) {
    const float* w = weights_of(own, piece, 1);
    for (int64_t k = 0; k < piece.width; ++k) sum = fma(load16(w + k * 16), broadcast(from[piece.place + k]), sum);
  }
  store16(to, sum);
  activate(activation, to, 1);
}

// The gates of an instance, from the sums of its rows.
void gate(const Chunk& c, int64_t instance, const float* sums, float* gates) {
  const Arguments& p = c.block;
  const std::vector<Block>& blocks = c.selected.hidden.blocks;
  const int64_t width = c.planes() * 16;
  sums += instance * p.Ho * width, gates += instance * width;
  const Vector share = broadcast(1.f / static_cast<float>(p.Ho * p.Wo));
  for (int64_t n = 0; n < width; n += 16) {
    Vector sum = zeros();
    for (int64_t y = 0; y < p.Ho; ++y) sum = add(sum, load16(sums + y * width + n));
    store16(gates + n, multiply(sum, share));
  }
  std::vector<float> squeezed(round_up(p.Q, 16));
  const std::vector<Piece> means = pieces_of(c.selected.hidden, 16), all = cut({{0, p.Q}}, 16);
  for (int64_t n = 0; n * 16 < p.Q; ++n)
    product(p.squeeze, n, p.M, p.squeeze_bias, lanes_of(p.Q - n * 16), p.squeeze_activation, gates, means,
            &squeezed[n * 16]);
  for (int64_t n = 0; n < c.planes(); ++n)
    product(p.excite, blocks[n].index, p.Q, p.excite_bias, static_cast<Lanes>(blocks[n].lanes), p.gate_activation,
            squeezed.data(), all, gates + n * 16);
}

// `count` pixels of each plane times the gates of their instance.
void apply_gates(const Chunk& c, const float* gates, int64_t plane, int64_t count, float* at) {
  for (int64_t n = 0; n < c.planes(); ++n) {
    const Vector factor = load16(gates + n * 16);
    for (float *to = at + n * plane, *end = to + count * 16; to != end; to += 16)
      store16(to, multiply(load16(to), factor));
  }
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
