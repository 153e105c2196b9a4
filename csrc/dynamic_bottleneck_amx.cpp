// The bottleneck block in bfloat16 with AMX: as the residual block (dynamic_residual_amx.cpp), with a convolution more
// and a map more in scratch memory; the maps and the loop over tiles are those of amx_maps.h.
#include <algorithm>
#include <stdexcept>

#include "dispatch.h"
#include "dynamic_bf16.h"
#include "dynamic_bottleneck.h"
#ifdef DEN_KERNELS_AMX
#include "amx_maps.h"
#endif
#include "direct_chunks.h"

namespace den_kernels {
#ifdef DEN_KERNELS_AMX
namespace {

using Arguments = BottleneckArguments<bf16>;

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// Instances order[start : start + count] and their three maps: the input of conv1, of conv2 and of conv3.
struct Chunk {
  const Arguments& block;
  int64_t start, count;
  const Channels &stream, &hidden, &outputs;
  Map maps[3];
  bf16* scratch;
  int64_t groups(int i) const {
    return (count + maps[i].together - 1) / maps[i].together;
  }  // the last may be part empty
  int64_t size(int i) const { return groups(i) * maps[i].group(); }
  bf16* map(int i) const { return scratch + (i > 0 ? size(0) : 0) + (i > 1 ? size(1) : 0); }
  int64_t bytes(int64_t) const { return 2 * (size(0) + size(1) + size(2)); }
  Tiling tiling(int i) const { return i ? tiling_of(block.Ho, block.Wo) : tiling_of(block.H, block.W); }
  int64_t items(int i) const {  // items of the convolution that reads map i
    const int64_t tiles = groups(i) * tiling(i).count, quads = (tiles + 3) / 4;
    return static_cast<int64_t>((i < 2 ? hidden : outputs).blocks.size()) * quads;
  }
  int64_t hidden_count() const { return items(0); }
  int64_t output_count() const { return items(2); }
};

Chunk make_chunk(const Arguments& p, const Channels& stream, const Channels& hidden, const Channels& outputs,
                 int64_t start, int64_t count) {
  const Window first{p.H, p.W, 0, 0, p.H, p.W, 1, 1, {1, 1}};
  const Window second{p.H, p.W, p.R / 2, p.S / 2, p.Ho, p.Wo, p.R, p.S, {p.stride, p.stride}};
  const Window third{p.Ho, p.Wo, 0, 0, p.Ho, p.Wo, 1, 1, {1, 1}};
  return {p,
          start,
          count,
          stream,
          hidden,
          outputs,
          {make_map(first, stream, count), make_map(second, hidden, count), make_map(third, hidden, count)},
          nullptr};
}

void clear_maps(const Chunk& c, int64_t begin, int64_t end) {
  for (int i = 0; i < 3; ++i)
    for (int64_t j = begin; j < end; ++j)
      if (j % c.maps[i].together == 0) clear_border(c.maps[i], c.map(i) + c.maps[i].instance(j));
}

// One row of the input, activated.
void activate_row(const Chunk& c, int64_t j, int64_t row) {
  const Arguments& p = c.block;
  const Map& map = c.maps[0];
  const bf16* x = p.x + (p.route.order[c.start + j] * p.H + row) * p.W * p.C;
  bf16* to = c.map(0) + map.instance(j) + map.at(row, 0);
  for (int64_t k = 0; k < p.C; k += 32, to += map.plane) {
    if (!p.scale1) {
      activate_runs<false>(x + k, p.C, to, map.pixel(), p.W, ~0u, ~0u, Pair{}, Pair{});
      continue;
    }
    const Pair scale{_mm512_loadu_ps(p.scale1 + k), _mm512_loadu_ps(p.scale1 + k + 16)};
    const Pair shift{_mm512_loadu_ps(p.shift1 + k), _mm512_loadu_ps(p.shift1 + k + 16)};
    activate_runs<true>(x + k, p.C, to, map.pixel(), p.W, ~0u, ~0u, scale, shift);
  }
}

// relu(sum + bias) of the convolution that reads map i, into map i + 1. Channels that are not selected become zeros.
struct WriteHidden {
  const Chunk& chunk;
  int i;
  const float* biases;

  template <int outputs>
  KERNEL void run(const Place& at, int64_t slot, const float* sums) const {
    const Map& to = chunk.maps[i + 1];
    const int64_t together = chunk.maps[i].together, step = to.pixel(), sums_step = together * outputs * 16;
    const Block& block = chunk.hidden.blocks[slot];
    const __mmask32 live = block.lanes, written = lanes_of(to.unit), known = lanes_of(chunk.block.M - block.index * 32);
    const float* of_block = biases + block.index * 32;
    const Pair bias{_mm512_maskz_loadu_ps(static_cast<__mmask16>(known), of_block),
                    _mm512_maskz_loadu_ps(static_cast<__mmask16>(known >> 16), of_block + 16)};
    for (int64_t f = 0; f < std::min(together, chunk.count - at.group * together); ++f) {
      bf16* h = chunk.map(i + 1) + to.instance(at.group * together + f) + slot * to.plane;
      h += to.at(at.row + to.top, at.column + to.left);
      const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
      for (; s != end; h += step, s += sums_step) {
        const Pair sum = {_mm512_load_ps(s), outputs == 2 ? _mm512_load_ps(s + 16) : _mm512_setzero_ps()};
        _mm512_mask_storeu_epi16(h, written, _mm512_maskz_mov_epi16(live, rounded(relu(add(sum, bias)))));
      }
    }
  }
};

// Sums and bias added to the shortcut, rounded once.
struct FinishOutput {
  const Chunk& chunk;

  template <int outputs>
  KERNEL void run(const Place& at, int64_t slot, const float* sums) const {
    const Arguments& p = chunk.block;
    const int64_t together = chunk.maps[2].together, sums_step = together * outputs * 16;
    const Pair bias = p.bias3 ? load_pair(p.bias3 + slot * 32, outputs * 16) : Pair{};
    const __m512 least = _mm512_set1_ps(least_of(p));
    for (int64_t f = 0; f < std::min(together, chunk.count - at.group * together); ++f) {
      const int64_t instance = p.route.order[chunk.start + at.group * together + f];
      const int64_t first = ((instance * p.Ho + at.row) * p.Wo + at.column) * p.C_out + slot * 32;
      const bf16* shortcut = p.shortcut + first;
      bf16* out = p.out + first;
      const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
      for (; s != end; shortcut += p.C_out, out += p.C_out, s += sums_step) {
        if constexpr (outputs == 2) {
          const Pair sum = add({_mm512_load_ps(s), _mm512_load_ps(s + 16)}, bias);
          _mm512_storeu_si512(out, rounded(at_least(least, add(sum, widen(_mm512_loadu_si512(shortcut))))));
        } else {
          const __m512 sum = _mm512_add_ps(_mm512_load_ps(s), bias.low);
          const __m512 x = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(shortcut)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded(_mm512_max_ps(least, _mm512_add_ps(sum, x))));
        }
      }
    }
  }
};

// Items begin .. end of the convolution that reads map i.
template <class Finish>
void convolve_map(const Chunk& c, int i, int64_t begin, int64_t end, const Channels& inputs, const Channels& outputs,
                  const Section& weights, const Finish& finish) {
  const Arguments& p = c.block;
  const int64_t R = i == 1 ? p.R : 1, S = i == 1 ? p.S : 1, stride = i == 1 ? p.stride : 1, Wo = i ? p.Wo : p.W;
  const Convolution conv{c.maps[i], c.map(i), c.groups(i), Wo,     R,       S,
                         stride,    stride,   c.tiling(i), inputs, outputs, weights};
  convolve(conv, begin, end, finish);
}

void hidden_items(const Chunk& c, int64_t begin, int64_t end) {
  const Arguments& p = c.block;
  convolve_map(c, 0, begin, end, c.stream, c.hidden, {p.conv1, steps_of(p.C, 1, 1), true}, WriteHidden{c, 0, p.bias1});
}

bool has_middle(const Chunk&) { return true; }

void middle_stage(const Chunk& c, int64_t thread, int64_t threads) {
  const Arguments& p = c.block;
  const Section section = section_of(p.conv2, widths_of(p.sizes, p.M), c.hidden.end, p.M, p.R, p.S);
  int64_t begin, end;
  share(c.items(1), thread, threads, begin, end);
  convolve_map(c, 1, begin, end, c.hidden, c.hidden, section, WriteHidden{c, 1, p.bias2});
}

void output_items(const Chunk& c, int64_t begin, int64_t end) {
  const Arguments& p = c.block;
  const Section section = section_of(p.conv3, widths_of(p.sizes, p.M), c.hidden.end, p.C_out, 1, 1);
  convolve_map(c, 2, begin, end, c.hidden, c.outputs, section, FinishOutput{c});
}

#pragma GCC pop_options

}  // namespace

void dynamic_bottleneck(const BottleneckArguments<bf16>& p) {
  constexpr char op[] = "dynamic_bottleneck";
  if (!has_amx()) throw std::runtime_error("dynamic_bottleneck: this CPU has no AMX");
  check(p.C % 32 == 0, op, "channels", "divisible by 32", p.C);
  check(p.M % 16 == 0 && p.C_out % 16 == 0, op, "channels", "divisible by 16", p.M % 16 ? p.M : p.C_out);
  check(p.cardinality == 1, op, "cardinality", "1", p.cardinality);
  check(p.R % 2 && p.S % 2 && p.R * p.S <= max_taps, op, "kernel", "odd and at most 7 x 7", p.R * p.S);
  const int64_t threads = omp_get_max_threads(), multiple = together_of(p.Wo, 16);
  const Channels stream = channels_of({{0, p.C}}, p.C, 32), outputs = channels_of({{0, p.C_out}}, p.C_out, 32);
  const std::vector<Channels> hidden = channels_of(p.route, p.sizes, p.M, 32);
  run_instances(p, hidden, threads, multiple, [&](int64_t start, int64_t count, const Channels& selected) {
    return make_chunk(p, stream, selected, outputs, start, count);
  });
}

#else

void dynamic_bottleneck(const BottleneckArguments<bf16>&) {
  throw std::runtime_error("dynamic_bottleneck: this build has no AMX variant");
}

#endif

}  // namespace den_kernels
