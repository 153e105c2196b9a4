// float32: a band (conv_bands.h) copies the input rows that it reads, padded, into scratch memory that stays in the
// core's cache, convolves (direct_tiles.h) and writes its output rows whole, zeros included.
#include "dynamic_conv.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "band_map.h"
#include "direct_tiles.h"
#endif

namespace den_kernels {
#ifdef DEN_KERNELS_HAS_AVX512
namespace {

constexpr int quads_per_tile = 3;  // of four pixels: with two vectors of channels, 24 of 32 registers sum

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")

struct Quad {
  int64_t row, column, live;
};
KERNEL Quad quad_at(const Problem& p, int64_t q) {
  const int64_t per_row = (p.Wo + 3) / 4, column = q % per_row * 4;
  return {q / per_row, column, p.Wo - column < 4 ? p.Wo - column : 4};
}

KERNEL __mmask16 lanes(int64_t left) { return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1); }

// The blocks of output channels block[0 .. vectors - 1] of quads from q0: the sums, and zeros in lanes not selected.
template <int vectors, int quads>
void conv_tile(const Problem& p, const Band& band, const BandMap& map, const float* scratch, float* out,
               const Block* block, int64_t q0, const int64_t* taps, Ahead ahead) {
  const float* input[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(p, q0 + q);
    input[q] = scratch + (at.row * p.stride[0] * map.columns + at.column * p.stride[1]) * map.pixel;
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __mmask16 live = static_cast<__mmask16>(block[v].lanes);
    const __m512 bias = p.bias ? _mm512_maskz_loadu_ps(live, p.bias + block[v].index * 16) : _mm512_setzero_ps();
    UNROLL for (int i = 0; i < quads * 4; ++i) acc[i][v] = bias;
  }
  const int64_t weight_vector = round_up(p.C, 16) * p.R * p.S * 16;
  if (ahead.count) ahead.distance = (block[vectors].index - block[0].index) * weight_vector;
  sum_channels<vectors, quads, false>(
      acc, input, map.pixel * p.stride[1], 1, taps, p.R * p.S, p.weight + block[0].index * weight_vector,
      (block[vectors - 1].index - block[0].index) * weight_vector, band.inputs.pieces, ahead);
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(p, q0 + q);
    float* to = out + (at.row * p.Wo + at.column) * p.C_out;
    UNROLL for (int i = 0; i < 4; ++i) {
      if (i >= at.live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        const __m512 sum = _mm512_maskz_mov_ps(static_cast<__mmask16>(block[v].lanes), acc[q * 4 + i][v]);
        _mm512_mask_storeu_ps(to + i * p.C_out + block[v].index * 16, lanes(p.C_out - block[v].index * 16), sum);
      }
    }
  }
}

void run_band(const Problem& p, const Band& band, float* scratch) {
  const BandMap map(p, band);
  int64_t taps[max_taps];
  map.tap_offsets(p, taps);
  for (int64_t j = 0; j < band.count && map.pixel; ++j) copy_rows(p, band, map, j, scratch + j * map.size());

  const auto out_of = [&](int64_t j) {
    return p.out + (p.route.order[band.start + j] * p.Ho + band.first_row) * p.Wo * p.C_out;
  };
  const std::vector<Block>& blocks = band.outputs.blocks;
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const int64_t quads = band.rows * ((p.Wo + 3) / 4), tiles = (quads + quads_per_tile - 1) / quads_per_tile;
  for (int64_t i = 0; i < block_count; i += 2) {
    const bool two = i + 1 < block_count;
    for (int64_t j = 0; j < band.count; ++j)
      for (int64_t q = 0; q < quads; q += quads_per_tile) {
        const auto run = quads - q >= 3   ? (two ? conv_tile<2, 3> : conv_tile<1, 3>)
                         : quads - q == 2 ? (two ? conv_tile<2, 2> : conv_tile<1, 2>)
                                          : (two ? conv_tile<2, 1> : conv_tile<1, 1>);
        const int64_t tile = j * tiles + q / quads_per_tile;
        const Ahead ahead = i + 2 < block_count ? ahead_of(tile, band.count * tiles) : Ahead{};
        run(p, band, map, scratch + j * map.size(), out_of(j), &blocks[i], q, taps, ahead);
      }
  }
  for (const Run& gap : band.outputs.gaps)
    for (int64_t j = 0; j < band.count; ++j)
      for (int64_t i = 0; i < band.rows * p.Wo; ++i)
        std::memset(out_of(j) + i * p.C_out + gap.first, 0, gap.width * sizeof(float));
}

#pragma GCC pop_options

}  // namespace

void dynamic_conv(const Problem& p) {
  const auto bytes_of = [&p](const Band& band) { return band.count * BandMap(p, band).size() * 4; };
  run_bands(p, 16, 1, bytes_of,
            [&p](const Band& band, void* scratch) { run_band(p, band, static_cast<float*>(scratch)); });
}

#else

void dynamic_conv(const ConvProblem<float>&) {
  throw std::runtime_error("dynamic_conv: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
