// Convolutions with AMX over maps in scratch memory: their layout, how they are cut into tiles, and the loop over
// tiles.
//
// A map is [block of 32 channels][row][column][instance][32]: a tile's pixels lie 64 bytes apart, and where a row has
// at most 8 of them, rows of several instances lie together and fill the tile. Rows are padded on the left alone: the
// next row's left border is this row's right one. A map of fewer than 32 channels ("narrow") is [row][column][channel]:
// the S pixels under a row of the kernel are then one run of inputs, which is cut into equal steps whatever pixel they
// belong to (amx_pack.h).
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "amx_pack.h"
#include "amx_tiles.h"
#include "direct_chunks.h"

namespace den_kernels {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// The maps of a convolution of one instance: it reads H x W pixels with zeros above, below and at the sides, and writes
// Ho x Wo.
struct Window {
  int64_t H, W, top, left, Ho, Wo, R, S, stride[2];
};

// A zero-padded map of `together` interleaved instances in scratch memory. unit: 32 channels, or all of a narrow map
// and the zeros that its cutting adds.
struct Map {
  int64_t H, W, top, left, columns, together, unit, blocks, plane;
  int64_t group() const { return plane * blocks; }
  int64_t pixel() const { return together * unit; }
  int64_t instance(int64_t j) const { return j / together * group() + j % together * unit; }
  int64_t at(int64_t row, int64_t column) const { return (row * columns + column) * pixel(); }
};

// The tiles into which the output map of a convolution is cut: `span` columns of a row, of all interleaved instances.
struct Tiling {
  int64_t span, per_row, count;
};

inline Tiling tiling_of(int64_t Ho, int64_t Wo) {
  const int64_t pieces = (Wo + 15) / 16, span = (Wo + pieces - 1) / pieces, per_row = (Wo + span - 1) / span;
  return {span, per_row, Ho * per_row};
}

// Instances that fill a tile together. A narrow or strided map is read from one at a time.
inline int64_t together_of(int64_t Wo, int64_t count) { return std::max<int64_t>(1, std::min(16 / Wo, count)); }

inline Map make_map(const Window& w, const Channels& channels, int64_t count) {
  const int64_t together = is_narrow(channels.end) || w.stride[1] > 1 ? 1 : together_of(w.Wo, count);
  const int64_t unit = is_narrow(channels.end) ? cutting_of(channels.end, w.S).unit : 32;
  const int64_t columns = w.W + w.left, rows = w.H + 2 * w.top;
  const Tiling tiling = tiling_of(w.Ho, w.Wo);
  const int64_t last_row = (w.Ho - 1) * w.stride[0] + w.R - 1;
  const int64_t read = last_row * columns + (tiling.per_row * tiling.span - 1) * w.stride[1] + w.S;
  const int64_t pixels = std::max(rows * columns + w.left, read);
  const int64_t plane = round_up(pixels * together * unit + 32, 32);
  return {w.H, w.W, w.top, w.left, columns, together, unit, static_cast<int64_t>(channels.blocks.size()), plane};
}

KERNEL void clear(bf16* from, int64_t count) { std::memset(from, 0, static_cast<size_t>(count) * 2); }

// Zeros around the map of a group of instances.
inline void clear_border(const Map& m, bf16* group) {
  for (int64_t block = 0; block < m.blocks; ++block) {
    bf16* plane = group + block * m.plane;
    clear(plane, m.at(m.top, m.left));
    for (int64_t r = 1; r < m.H; ++r) clear(plane + m.at(m.top + r, 0), m.left * m.pixel());
    clear(plane + m.at(m.top + m.H, 0), m.at(m.top, m.left));
  }
}

KERNEL __mmask32 lanes_of(int64_t left) { return left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1; }

KERNEL Pair add(const Pair& x, const Pair& y) { return {_mm512_add_ps(x.low, y.low), _mm512_add_ps(x.high, y.high)}; }

KERNEL Pair load_pair(const float* from, int64_t left) {
  const __mmask32 lanes = lanes_of(left);
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16)};
}

KERNEL Pair at_least(__m512 least, const Pair& v) {  // a NaN passes
  return {_mm512_max_ps(least, v.low), _mm512_max_ps(least, v.high)};
}

KERNEL Pair relu(const Pair& v) { return at_least(_mm512_setzero_ps(), v); }

// count runs of up to 32 values, one every `from_step` and `to_step` elements, activated.
template <bool affine>
KERNEL void activate_runs(const bf16* from, int64_t from_step, bf16* to, int64_t to_step, int64_t count, __mmask32 read,
                          __mmask32 written, const Pair& scale, const Pair& shift) {
  for (int64_t i = 0; i < count; ++i, from += from_step, to += to_step) {
    __m512i v = _mm512_maskz_loadu_epi16(read, from);
    if constexpr (affine) {
      const Pair x = widen(v);
      const Pair y = {_mm512_fmadd_ps(x.low, scale.low, shift.low), _mm512_fmadd_ps(x.high, scale.high, shift.high)};
      v = rounded(relu(y));
    }
    _mm512_mask_storeu_epi16(to, written, v);
  }
}

// A convolution of `groups` maps, one after the other from `maps`, over the blocks of `inputs` to those of `outputs`.
struct Convolution {
  const Map& map;
  const bf16* maps;
  int64_t groups, Wo, R, S, row_stride, column_stride;
  Tiling tiling;
  const Channels &inputs, &outputs;
  Section weights;  // of the first tile of all outputs
  int64_t tiles() const { return groups * tiling.count; }
  int64_t quads() const { return (tiles() + 3) / 4; }
  int64_t items() const { return static_cast<int64_t>(outputs.blocks.size()) * quads(); }
};

// The place of a tile of sums on the output map.
struct Place {
  int64_t group, row, column, live;
};

// Four tiles, or what is left of them: `outputs` tiles of channels of the block of outputs at `slot`.
template <int outputs, class Finish>
void four_tiles(const Convolution& c, int64_t tile, int64_t slot, const int64_t* taps, int64_t tap_count,
                const Finish& finish) {
  constexpr int at_once = 4 / outputs;
  const Map& m = c.map;
  const Tiling& cut = c.tiling;
  const bf16* weight = c.weights.weights + c.outputs.blocks[slot].index * 2 * c.weights.steps * 512;
  alignas(64) float sums[4 * 256];
  for (int64_t last = std::min(tile + 4, c.tiles()); tile < last; tile += at_once) {
    Place places[at_once];
    const bf16* pixels[4];
    for (int i = 0; i < at_once; ++i) {
      const int64_t n = std::min(tile + i, last - 1), in_group = n % cut.count;
      const int64_t column = in_group % cut.per_row * cut.span;
      places[i] = {n / cut.count, in_group / cut.per_row, column, std::min(c.Wo - column, cut.span)};
      pixels[i] = c.maps + places[i].group * m.group() + m.at(places[i].row * c.row_stride, column * c.column_stride);
    }
    sum_tiles<outputs>(sums, pixels, m.unit * c.column_stride * 2, c.inputs.blocks, m.plane, taps, tap_count, weight,
                       c.weights.steps * 512);
    for (int i = 0; i < at_once && tile + i < last; ++i)
      finish.template run<outputs>(places[i], slot, sums + i * outputs * 256);
  }
}

// The weights, zeros for the inputs that are not selected: the map has zeros there too, whose products with what is not
// finite would be NaN.
inline std::vector<bf16> of_selected(const Convolution& c) {
  const bool narrow = is_narrow(c.inputs.end);
  const Cutting cut = narrow ? cutting_of(c.inputs.end, c.S) : Cutting{32, c.S, 16};
  const Block& last = c.outputs.blocks.back();
  const int64_t steps = c.weights.steps, count = (last.index * 2 + 1 + (last.lanes > 0xFFFF)) * steps;
  std::vector<bf16> made(c.weights.weights, c.weights.weights + count * 512);
  for (int64_t n = 0; n < count; ++n) {
    uint32_t lanes = 0;
    for (const Block& block : c.inputs.blocks)
      if (narrow || block.index == n % steps / (c.R * c.S)) lanes = block.lanes;
    for (int64_t k = 0; k < cut.pairs * 2; ++k) {
      const int64_t channel = narrow ? (n % steps % cut.steps * cut.pairs * 2 + k) % cut.unit : k;
      for (int64_t o = 0; o < 16 && !(lanes >> channel & 1); ++o)
        made[n * 512 + (k / 2 * 16 + o) * 2 + k % 2] = bf16{0};
    }
  }
  return made;
}

template <class Finish>
void convolve(const Convolution& c, int64_t begin, int64_t end, const Finish& finish);

template <class Finish>
__attribute__((noinline)) void convolve_selected(const Convolution& c, int64_t begin, int64_t end,
                                                 const Finish& finish) {
  const std::vector<bf16> weights = of_selected(c);
  Convolution made = c;
  made.weights = {weights.data(), c.weights.steps, true};
  convolve(made, begin, end, finish);
}

// Items begin..end of a convolution: for each block of outputs, four tiles at a time. finish.run<outputs>(place,
// slot, sums) takes the sums of a tile, [pixel][instance][outputs * 16].
template <class Finish>
void convolve(const Convolution& c, int64_t begin, int64_t end, const Finish& finish) {
  if (!c.weights.finite && !c.outputs.blocks.empty()) return convolve_selected(c, begin, end, finish);
  int64_t taps[max_taps], tap_count = 0;
  const bool narrow = is_narrow(c.inputs.end);
  const Cutting cut = narrow ? cutting_of(c.inputs.end, c.S) : Cutting{32, c.S, 16};
  for (int64_t r = 0; r < c.R; ++r)
    for (int64_t s = 0; s < cut.steps; ++s)
      taps[tap_count++] = c.map.at(r, 0) + s * (narrow ? cut.pairs * 2 : c.map.pixel());
  configure_tiles(c.tiling.span * c.map.together, cut.pairs);
  for (int64_t i = begin, quads = c.quads(); i < end; ++i) {
    const int64_t slot = i / quads, tile = i % quads * 4;
    const auto run = c.outputs.blocks[slot].lanes > 0xFFFF ? four_tiles<2, Finish> : four_tiles<1, Finish>;
    run(c, tile, slot, taps, tap_count, finish);
  }
  _tile_release();
}

#pragma GCC pop_options

}  // namespace den_kernels
