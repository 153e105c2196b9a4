// bfloat16: a band (conv_bands.h) copies the input rows that it reads into maps in scratch memory, convolves them tile
// by tile (amx_maps.h) and writes its output rows whole, zeros included.
#include "dynamic_bf16.h"

#include <cstring>

#include "conv_bands.h"
#include "dispatch.h"
#ifdef DEN_KERNELS_AMX
#include "amx_maps.h"
#endif

namespace den_kernels {
#ifdef DEN_KERNELS_AMX
namespace {

using Arguments = ConvArguments<bf16>;

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// The input rows that a band reads, those above and below the input included.
Map map_of(const Arguments& p, const Band& band) {
  const int64_t rows = (band.rows - 1) * p.stride[0] + p.R;
  const Window window{rows, p.W, 0, p.padding[1], band.rows, p.Wo, p.R, p.S, {p.stride[0], p.stride[1]}};
  return make_map(window, band.inputs, band.count);
}

// Zeros in `count` runs of `width` values.
KERNEL void clear_runs(bf16* to, int64_t step, int64_t count, int64_t width) {
  if (width == step) return clear(to, count * width);
  for (int64_t i = 0; i < count; ++i, to += step)
    for (int64_t k = 0; k < width; k += 32)
      _mm512_mask_storeu_epi16(to + k, lanes_of(width - k), _mm512_setzero_si512());
}

// Row r of the map of instance j: the channels in use.
void copy_row(const Arguments& p, const Band& band, const Map& map, int64_t j, int64_t r, bf16* maps) {
  const int64_t row = band.first_row * p.stride[0] - p.padding[0] + r;
  bf16* to = maps + map.instance(j) + map.at(r, map.left);
  const __mmask32 written = lanes_of(map.unit);
  if (row < 0 || row >= p.H) {
    for (int64_t k = 0; k < map.blocks; ++k, to += map.plane) clear_runs(to, map.pixel(), p.W, map.unit);
    return;
  }
  const bf16* from = p.x + (p.route.order[band.start + j] * p.H + row) * p.W * p.C;
  if (map.unit == p.C && map.together == 1 && band.inputs.count == p.C) {
    std::memcpy(to, from, static_cast<size_t>(p.W * p.C) * 2);
    return;
  }
  for (const Block& block : band.inputs.blocks) {
    activate_runs<false>(from + block.index * 32, p.C, to, map.pixel(), p.W, block.lanes, written, Pair{}, Pair{});
    to += map.plane;
  }
}

// A tile of sums with the bias added, rounded; zeros in the channels of its block that are not selected.
struct WriteOutput {
  const Arguments& arguments;
  const Band& band;
  int64_t together;

  template <int outputs>
  KERNEL void run(const Place& at, int64_t slot, const float* sums) const {
    const Arguments& p = arguments;
    const int64_t step = p.C_out, sums_step = together * outputs * 16;
    const int64_t channel = band.outputs.blocks[slot].index * 32;
    const __mmask32 live = band.outputs.blocks[slot].lanes, written = lanes_of(p.C_out - channel);
    const __m512 least = _mm512_set1_ps(least_of(p));
    const Pair bias = p.bias ? widen(_mm512_maskz_loadu_epi16(live, p.bias + channel)) : Pair{};
    for (int64_t f = 0; f < together; ++f) {
      const int64_t instance = p.route.order[band.start + at.group * together + f];
      bf16* out = p.out + ((instance * p.Ho + band.first_row + at.row) * p.Wo + at.column) * step + channel;
      const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
      for (; s != end; out += step, s += sums_step) {
        const Pair sum = {_mm512_load_ps(s), outputs == 2 ? _mm512_load_ps(s + 16) : _mm512_setzero_ps()};
        _mm512_mask_storeu_epi16(out, written, _mm512_maskz_mov_epi16(live, rounded(at_least(least, add(sum, bias)))));
      }
    }
  }
};

void run_band(const Arguments& p, const Band& band, bf16* maps) {
  const Map map = map_of(p, band);
  for (int64_t j = 0; j < band.count && band.inputs.count; ++j) {
    if (j % map.together == 0) clear_border(map, maps + map.instance(j));
    for (int64_t r = 0; r < map.H; ++r) copy_row(p, band, map, j, r, maps);
  }
  const Section section = section_of(p.weight, widths_of(p.in_sizes, p.C), band.inputs.end, p.C_out, p.R, p.S);
  const Convolution conv{map,         maps,        band.count / map.together,  p.Wo,        p.R,          p.S,
                         p.stride[0], p.stride[1], tiling_of(band.rows, p.Wo), band.inputs, band.outputs, section};
  convolve(conv, 0, conv.items(), WriteOutput{p, band, map.together});

  for (const Range& gap : band.outputs.gaps)
    for (int64_t j = 0; j < band.count; ++j) {
      bf16* out = p.out + (p.route.order[band.start + j] * p.Ho + band.first_row) * p.Wo * p.C_out + gap.first;
      clear_runs(out, p.C_out, band.rows * p.Wo, gap.width);
    }
}

#pragma GCC pop_options

}  // namespace

void dynamic_conv_amx(const Arguments& p) {
  const auto bytes_of = [&p](const Band& band) {
    const Map map = map_of(p, band);
    return band.count / map.together * map.group() * 2;
  };
  run_bands(p, 32, together_of(p.Wo, 16), bytes_of,
            [&p](const Band& band, void* scratch) { run_band(p, band, static_cast<bf16*>(scratch)); });
}

#endif

}  // namespace den_kernels
