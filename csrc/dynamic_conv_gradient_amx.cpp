// The weight gradient in bfloat16 with AMX, for stride 1. Of a band (conv_bands.h), the inputs lie as planes, padded:
// the inputs of a tap are then those of the first tap, shifted, and 32 neighbouring pixels of 16 channels are a tile.
// The gradients of the same pixels, in pairs, are the other: zeros where a plane has padding. A tile of sums, 16 inputs
// x 16 outputs of one tap, lies in the thread's sums as it is.
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "amx_config.h"
#include "conv_gradient.h"

namespace den_kernels {
namespace {

using Arguments = ConvArguments<bf16>;

constexpr int64_t step = 32;           // pixels of a tile
constexpr int64_t steps_at_once = 12;  // their gradients and inputs of 32 channels each stay near the first-level cache

// The planes of a band's instances in scratch memory, [instance][channel][row][column].
struct Planes {
  int64_t rows, columns, pixels, plane, channels;  // pixels: of an instance's output rows, with padding between them
  Planes(const Arguments& p, const Band& band)
      : rows(band.rows + p.R - 1),
        columns(std::max(p.W + p.padding[1], p.Wo)),  // a row's right border is the next one's left border
        pixels(round_up((band.rows - 1) * columns + p.Wo, step)),
        plane(round_up(std::max(rows * columns, pixels + (p.R - 1) * columns) + p.S, step)),
        channels(static_cast<int64_t>(band.inputs.blocks.size()) * 32) {
    if (plane / step % 2 == 0) plane += step;  // an odd number of cache lines: a tile's rows fall into different sets
  }
  int64_t steps() const { return pixels / step; }
  int64_t instance() const { return channels * plane; }
};

// Some steps of a band: where each lies in an instance's planes, and the gradients of 32 outputs, [step][16 outputs][16
// pairs of pixels][16 outputs][2].
struct Panel {
  int64_t count, input[steps_at_once];
  alignas(64) bf16 values[steps_at_once * 2 * 512];
};

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// Instance j's inputs, zeros around them and in the channels of its blocks that it does not use.
void copy_planes(const Arguments& p, const Band& band, const Planes& planes, int64_t j, bf16* to) {
  std::memset(to, 0, static_cast<size_t>(planes.instance()) * 2);
  const bf16* x = p.x + p.route.order[band.start + j] * p.H * p.W * p.C;
  for (int64_t r = 0; r < planes.rows; ++r) {
    const int64_t row = band.first_row - p.padding[0] + r;
    if (row < 0 || row >= p.H) continue;
    bf16* place = to + r * planes.columns + p.padding[1];
    for (const Block& block : band.inputs.blocks) {
      for (int64_t c = 0; c < p.W; c += 16) {
        const bf16* from = x + (row * p.W + c) * p.C + block.index * 32;
        const __mmask16 live = lanes_of(p.W - c);
        __m512 words[16];
        UNROLL for (int i = 0; i < 16; ++i) {
          words[i] = i < p.W - c ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(block.lanes, from + i * p.C))
                                 : _mm512_setzero_ps();
        }
        transpose16(words);
        UNROLL for (int i = 0; i < 16; ++i) {
          const __m512i pair = _mm512_castps_si512(words[i]);
          _mm512_mask_cvtepi32_storeu_epi16(place + 2 * i * planes.plane + c, live, pair);
          _mm512_mask_cvtepi32_storeu_epi16(place + (2 * i + 1) * planes.plane + c, live, _mm512_srli_epi32(pair, 16));
        }
      }
      place += 32 * planes.plane;
    }
  }
}

// Steps first .. first + count of a band, with the gradients of the outputs of `block`.
void fill(Panel& panel, const Arguments& p, const Band& band, const Planes& planes, const bf16* grad, int64_t first,
          const Block& block) {
  const __mmask16 lanes[2] = {static_cast<__mmask16>(block.lanes), static_cast<__mmask16>(block.lanes >> 16)};
  for (int64_t n = 0; n < panel.count; ++n) {
    const int64_t j = (first + n) / planes.steps(), begin = (first + n) % planes.steps() * step;
    const bf16* of_instance = grad + (p.route.order[band.start + j] * p.Ho + band.first_row) * p.Wo * p.C_out;
    panel.input[n] = j * planes.instance() + begin;
    int64_t row = begin / planes.columns, column = begin % planes.columns;
    for (int64_t i = 0; i < step / 2; ++i) {
      __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      UNROLL for (int half = 0; half < 2; ++half) {
        if (column < p.Wo && row < band.rows) {
          const bf16* from = of_instance + (row * p.Wo + column) * p.C_out + block.index * 32;
          UNROLL for (int v = 0; v < 2; ++v) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes[v], from + v * 16));
            pair[v] = _mm512_or_si512(pair[v], half ? _mm512_slli_epi32(wide, 16) : wide);
          }
        }
        if (++column == planes.columns) {
          column = 0;
          ++row;
        }
      }
      UNROLL for (int v = 0; v < 2; ++v) _mm512_store_si512(panel.values + ((n * 2 + v) * 16 + i) * 32, pair[v]);
    }
  }
}

// sums[v][k] += sum over the panel's pixels of inputs k * 16 .. and outputs v * 16 ..; inputs: the first plane.
// `outputs_step` floats from outputs v to the next, `plane` values from an input to the next.
template <int outputs, int inputs>
void gradient_tiles(const Panel& panel, const bf16* planes, int64_t plane, float* sums, int64_t outputs_step) {
  float* const second = sums + outputs_step;
  _tile_loadd(0, sums, 64);
  if constexpr (inputs == 2) _tile_loadd(1, sums + 256, 64);
  if constexpr (outputs == 2) _tile_loadd(2, second, 64);
  if constexpr (outputs == 2 && inputs == 2) _tile_loadd(3, second + 256, 64);
  for (int64_t n = 0; n < panel.count; ++n) {
    const bf16 *in = planes + panel.input[n], *out = panel.values + n * 1024;
    _tile_loadd(4, in, plane * 2);
    _tile_loadd(6, out, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (outputs == 2) {
      _tile_loadd(7, out + 512, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (inputs == 2) {
      _tile_loadd(5, in + 16 * plane, plane * 2);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (outputs == 2 && inputs == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  if constexpr (inputs == 2) _tile_stored(1, sums + 256, 64);
  if constexpr (outputs == 2) _tile_stored(2, second, 64);
  if constexpr (outputs == 2 && inputs == 2) _tile_stored(3, second + 256, 64);
}

void add_band(const Arguments& p, const bf16* grad, const Band& band, bf16* scratch, float* sums) {
  const Planes planes(p, band);
  const int64_t taps = p.R * p.S, inputs = sum_inputs(p), steps = band.count * planes.steps();
  for (int64_t j = 0; j < band.count; ++j) copy_planes(p, band, planes, j, scratch + j * planes.instance());
  configure_tiles(16);
  Panel panel;
  for (int64_t first = 0; first < steps; first += steps_at_once) {
    panel.count = std::min(steps_at_once, steps - first);
    for (const Block& out : band.outputs.blocks) {
      fill(panel, p, band, planes, grad, first, out);
      const bool two_outputs = out.lanes > 0xFFFF;
      int64_t place = 0;
      for (const Block& in : band.inputs.blocks) {
        const bool two_inputs = in.lanes > 0xFFFF;
        const auto run = two_outputs ? (two_inputs ? gradient_tiles<2, 2> : gradient_tiles<2, 1>)
                                     : (two_inputs ? gradient_tiles<1, 2> : gradient_tiles<1, 1>);
        for (int64_t t = 0; t < taps; ++t) {
          float* to = sums + ((out.index * 2 * taps + t) * inputs + in.index * 32) * 16;
          run(panel, scratch + place + t / p.S * planes.columns + t % p.S, planes.plane, to, taps * inputs * 16);
        }
        place += 32 * planes.plane;
      }
    }
  }
  _tile_release();
}

#pragma GCC pop_options

}  // namespace

void dynamic_conv_weight_gradient_amx(const Arguments& p, const bf16* grad, bf16* dweight) {
  const auto bytes_of = [&p](const Band& band) { return band.count * Planes(p, band).instance() * 2; };
  sum_bands(p, 32, dweight, bytes_of, [&](const Band& band, float* scratch, float* sums) {
    add_band(p, grad, band, reinterpret_cast<bf16*>(scratch), sums);
  });
}

}  // namespace den_kernels
#endif
