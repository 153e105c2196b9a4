// How it goes: a chunk of instances of one level is taken by a thread (or, when there are fewer instances than threads
// can share, by all threads together). bn1 and ReLU write the padded input map into scratch memory, conv1 writes the
// padded hidden map beside it, conv2 adds its sums into the residual stream. Both maps stay in the core's cache; of main
// memory only the residual stream is touched, once. Of the two inner loops (direct_tiles.h) the one by output channels
// is the rule; conv1 goes by pixels for widths that would leave its lanes empty (4, 8 hidden channels), on maps 16 pixels
// wide or more. Maps are [pixel][channel] for the first and [channel][pixel] for the second; conv2 reads either.
#include "dynamic_residual.h"

#include <algorithm>
#include <vector>

#include <pybind11/stl.h>

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
          for (int64_t k = 0; k < inputs; ++k) to[k * 16 + q] = from[q * taps * I + k] * (scale ? scale[o * 16 + q] : 1.f);
      }
    }
}

#ifdef DEN_KERNELS_HAS_AVX512
namespace {

constexpr int quads_per_tile = 3;            // of four pixels: with two vectors of channels, 24 of 32 registers sum

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
  int64_t start, count, width;
  PaddedMap a, h;
  float* scratch;
  float* a_of(int64_t j) const { return scratch + j * (a.size() + h.size()); }
  float* h_of(int64_t j) const { return a_of(j) + a.size(); }
  int64_t bytes() const { return count * (a.size() + h.size()) * 4; }
  int64_t quads() const { return block.Ho * ((block.Wo + 3) / 4); }
  int64_t tiles() const { return (quads() + quads_per_tile - 1) / quads_per_tile; }
  int64_t hidden_blocks() const { return h.planar ? (width + 3) / 4 : (width + 31) / 32; }
  int64_t hidden_count() const { return hidden_blocks() * count * (h.planar ? vector_rows() : tiles()); }
  int64_t output_count() const { return (block.C_out / 16 + 1) / 2 * count * tiles(); }
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

// Output pixels of quad q: row, first column, and how many of the four lie on the map.
struct Quad {
  int64_t row, column, live;
};
KERNEL Quad quad_at(const ResidualBlock<float>& b, int64_t q) {
  const int64_t per_row = (b.Wo + 3) / 4, column = q % per_row * 4;
  return {q / per_row, column, b.Wo - column < 4 ? b.Wo - column : 4};
}

// One tile of conv1: relu(sum + bias) into the hidden map, [pixel][channel].
template <int vectors, int quads>
void hidden_tile(const Chunk& c, int64_t j, int64_t block16, int64_t q0, const int64_t* taps) {
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, hidden = block16 * 16;
  const float* input[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    input[q] = c.a_of(j) + (at.row * b.stride * c.a.columns + at.column * b.stride) * c.a.pixel();
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const int64_t left = b.M - hidden - v * 16;
    const __mmask16 lanes = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    const __m512 bias = _mm512_maskz_loadu_ps(lanes, b.bias1 + hidden + v * 16);
    UNROLL for (int p = 0; p < quads * 4; ++p) acc[p][v] = bias;
  }
  const int64_t weight_vector = round_up(b.C, 16) * tap_count * 16;
  sum_channels<vectors, quads, false>(acc, input, c.a.pixel() * b.stride, 1, taps, tap_count,
                                      b.conv1 + block16 * weight_vector, weight_vector, b.C);
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    float* h = c.h_of(j) + ((at.row + b.R / 2) * c.h.columns + at.column + b.S / 2) * c.h.pixel() + hidden;
    UNROLL for (int p = 0; p < 4; ++p) {
      if (p >= at.live) break;
      UNROLL for (int v = 0; v < vectors; ++v)
        _mm512_storeu_ps(h + p * c.h.pixel() + v * 16, _mm512_max_ps(_mm512_setzero_ps(), acc[q * 4 + p][v]));
    }
  }
}

// One tile of conv1 by pixels: `outputs` hidden channels, four vectors of 16 pixels, into the planar hidden map.
template <int outputs>
void hidden_planes(const Chunk& c, int64_t j, int64_t hidden, int64_t v0, int64_t live, const int64_t* taps) {
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, per_row = b.Wo / 16;
  const float* input[4];
  UNROLL for (int v = 0; v < 4; ++v) {
    const int64_t at = v0 + (v < live ? v : 0);
    input[v] = c.a_of(j) + at / per_row * c.a.columns + at % per_row * 16;
  }
  __m512 acc[outputs][4];
  UNROLL for (int o = 0; o < outputs; ++o) UNROLL for (int v = 0; v < 4; ++v) acc[o][v] = _mm512_set1_ps(b.bias1[hidden + o]);
  const float* weight = b.conv1 + hidden / 16 * round_up(b.C, 16) * tap_count * 16 + hidden % 16;
  sum_pixels<outputs, 4>(acc, input, c.a.channel(), taps, tap_count, weight, b.C);
  UNROLL for (int v = 0; v < 4; ++v) {
    if (v >= live) break;
    const int64_t row = (v0 + v) / per_row + b.R / 2, column = (v0 + v) % per_row * 16 + b.S / 2;
    UNROLL for (int o = 0; o < outputs; ++o)
      _mm512_storeu_ps(c.h_of(j) + (hidden + o) * c.h.channel() + row * c.h.columns + column,
                       _mm512_max_ps(_mm512_setzero_ps(), acc[o][v]));
  }
}

// One tile of conv2: sums added into the residual stream.
template <int vectors, int quads, bool planar>
void output_tile(const Chunk& c, int64_t j, int64_t block16, int64_t q0, const int64_t* taps) {
  const ResidualBlock<float>& b = c.block;
  const int64_t tap_count = b.R * b.S, channel = block16 * 16;
  const float* input[quads];
  float* out[quads];
  UNROLL for (int q = 0; q < quads; ++q) {
    const Quad at = quad_at(b, q0 + q);
    input[q] = c.h_of(j) + (at.row * c.h.columns + at.column) * c.h.pixel();
    out[q] = b.out + ((b.order[c.start + j] * b.Ho + at.row) * b.Wo + at.column) * b.C_out + channel;
  }
  __m512 acc[quads * 4][vectors];
  UNROLL for (int v = 0; v < vectors; ++v) {
    const __m512 bias = b.bias2 ? _mm512_loadu_ps(b.bias2 + channel + v * 16) : _mm512_setzero_ps();
    UNROLL for (int p = 0; p < quads * 4; ++p) acc[p][v] = bias;
  }
  const int64_t weight_vector = round_up(b.M, 16) * tap_count * 16;
  sum_channels<vectors, quads, planar>(acc, input, c.h.pixel(), c.h.channel(), taps, tap_count,
                                       b.conv2 + block16 * weight_vector, weight_vector, c.width);
  UNROLL for (int q = 0; q < quads; ++q) {
    const int64_t live = quad_at(b, q0 + q).live;
    UNROLL for (int p = 0; p < 4; ++p) {
      if (p >= live) break;
      UNROLL for (int v = 0; v < vectors; ++v) {
        float* at = out[q] + p * b.C_out + v * 16;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), acc[q * 4 + p][v]));
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
  const float* x = b.x + (b.order[c.start + j] * b.H + row) * b.W * b.C;
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

// Zeros around a map. Of the hidden map also of channels that the rounded-up width adds: conv2 does not read them.
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

#define TILE(NAME, VECTORS, ...)                                              \
  (quads == 3   ? NAME<VECTORS, 3 __VA_ARGS__>(c, j, block16, q0, taps)       \
   : quads == 2 ? NAME<VECTORS, 2 __VA_ARGS__>(c, j, block16, q0, taps)       \
                : NAME<VECTORS, 1 __VA_ARGS__>(c, j, block16, q0, taps))

// Items begin..end of conv1: for each block of hidden channels, each instance, each tile.
void hidden_items(const Chunk& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.a, taps);
  if (c.h.planar) {
    const int64_t tiles = c.vector_rows(), vectors = c.block.Ho * c.block.Wo / 16;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t hidden = i / (tiles * c.count) * 4, j = i / tiles % c.count, v0 = i % tiles * 4;
      const int64_t outputs = c.width - hidden, live = vectors - v0 < 4 ? vectors - v0 : 4;
      if (outputs >= 4) hidden_planes<4>(c, j, hidden, v0, live, taps);
      else if (outputs == 3) hidden_planes<3>(c, j, hidden, v0, live, taps);
      else if (outputs == 2) hidden_planes<2>(c, j, hidden, v0, live, taps);
      else hidden_planes<1>(c, j, hidden, v0, live, taps);
    }
    return;
  }
  const int64_t tiles = c.tiles();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block16 = i / (tiles * c.count) * 2, j = i / tiles % c.count, q0 = i % tiles * quads_per_tile;
    const int64_t quads = c.quads() - q0 < 3 ? c.quads() - q0 : 3;
    if (c.width > (block16 + 1) * 16) TILE(hidden_tile, 2, );
    else TILE(hidden_tile, 1, );
  }
}

// Items begin..end of conv2: for each block of output channels, each instance, each tile.
void output_items(const Chunk& c, int64_t begin, int64_t end) {
  int64_t taps[max_taps];
  tap_offsets(c.block, c.h, taps);
  const int64_t tiles = c.tiles();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t block16 = i / (tiles * c.count) * 2, j = i / tiles % c.count, q0 = i % tiles * quads_per_tile;
    const int64_t quads = c.quads() - q0 < 3 ? c.quads() - q0 : 3;
    const bool two = c.block.C_out > (block16 + 1) * 16;
    if (c.h.planar && two) TILE(output_tile, 2, , true);
    else if (c.h.planar) TILE(output_tile, 1, , true);
    else if (two) TILE(output_tile, 2, , false);
    else TILE(output_tile, 1, , false);
  }
}
#undef TILE
#pragma GCC pop_options

Chunk make_chunk(const ResidualBlock<float>& b, int64_t start, int64_t count, int64_t width) {
  // By pixels where blocks of 4 hidden channels waste less than blocks of 16.
  const bool planar = b.stride == 1 && b.W % 16 == 0 && round_up(width, 4) < round_up(width, 16);
  const int64_t hidden = planar ? width : round_up(width, 16);
  return {b, start, count, width, padded_map(b.H, b.W, b.C, planar, b.R, b.S, b.stride),
          padded_map(b.Ho, b.Wo, hidden, planar, b.R, b.S, 1), nullptr};
}

}  // namespace

bool has_dynamic_residual() { return DEN_KERNELS_HAS_AVX512; }

void dynamic_residual(const ResidualBlock<float>& b) {
  check_block(b);
  const int64_t threads = omp_get_max_threads();
  const auto make = [&b](int64_t start, int64_t count, int64_t width) { return make_chunk(b, start, count, width); };
  run_chunks(make_chunks(b, threads, 1, make), threads);
}

#else

bool has_dynamic_residual() { return false; }

void dynamic_residual(const ResidualBlock<float>&) {
  throw std::runtime_error("dynamic_residual: this build has no AVX-512 variant");
}

#endif

namespace {

template <class T>
void call(uintptr_t x, uintptr_t out, uintptr_t order, uintptr_t offsets, const std::vector<int64_t>& input,
          int64_t stride, const std::vector<int64_t>& weights, const std::vector<int64_t>& widths, uintptr_t scale1,
          uintptr_t shift1, uintptr_t conv1, uintptr_t bias1, uintptr_t conv2, uintptr_t bias2) {
  const auto values = [](uintptr_t p) { return reinterpret_cast<const T*>(p); };
  const auto floats = [](uintptr_t p) { return reinterpret_cast<const float*>(p); };
  const auto ints = [](uintptr_t p) { return reinterpret_cast<const int32_t*>(p); };
  const int64_t H = input[1], W = input[2], Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride;
  pybind11::gil_scoped_release unlocked;
  dynamic_residual(ResidualBlock<T>{
      input[0], H, W, input[3], Ho, Wo, weights[0], weights[1], weights[2], weights[3], stride,
      static_cast<int64_t>(widths.size()) - 1, widths.data(), values(x), reinterpret_cast<T*>(out), ints(order),
      ints(offsets), floats(scale1), floats(shift1), values(conv1), floats(bias1), values(conv2), floats(bias2)});
}

constexpr char weights_and_sizes[] = "weights: [C_out, M, R, S]; input: [B, H, W, C]; widths: [G + 1]";

}  // namespace

void bind_dynamic_residual(pybind11::module_& m) {
  m.def("has_dynamic_residual", &has_dynamic_residual);
  m.def("has_dynamic_residual_bf16", &has_dynamic_residual_bf16);
  m.def("packed_size_bf16", &packed_size_bf16);
  m.def("pack_weights_bf16",
        [](uintptr_t weight, uintptr_t scale, uintptr_t packed, int64_t O, int64_t R, int64_t S,
           const std::vector<int64_t>& widths) {
          pack_weights_bf16(reinterpret_cast<const bf16*>(weight), reinterpret_cast<const float*>(scale),
                            reinterpret_cast<bf16*>(packed), O, R, S, widths);
        });
  m.def("pack_weights",
        [](uintptr_t weight, uintptr_t scale, uintptr_t packed, int64_t O, int64_t taps, int64_t I) {
          pack_weights(reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(scale),
                       reinterpret_cast<float*>(packed), O, taps, I);
        });
  m.def("dynamic_residual", &call<float>, weights_and_sizes);
  m.def("dynamic_residual_bf16", &call<bf16>, weights_and_sizes);
}

}  // namespace den_kernels
