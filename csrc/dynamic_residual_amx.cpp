// The residual block in bfloat16 with AMX. As in float32 (direct_residual.h) a chunk of instances of one level goes
// through the whole block in scratch memory; its maps and the loop over tiles are those of amx_maps.h.
#include "dynamic_bf16.h"

#include "dispatch.h"

#ifdef DEN_KERNELS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_maps.h"
#endif
#include "direct_chunks.h"

namespace den_kernels {
#ifdef DEN_KERNELS_AMX
namespace {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// The data that both convolutions of one chunk use.
struct Chunk {
  const ResidualBlock<bf16>& block;
  int64_t start, count;
  const Channels &stream, &hidden, &outputs;
  Tiling tiling;
  Map a, h;
  bf16* scratch;
  bf16* a_of(int64_t j) const { return scratch + a.instance(j); }
  bf16* h_of(int64_t j) const { return scratch + count / a.together * a.group() + h.instance(j); }
  int64_t bytes(int64_t) const { return 2 * (count / a.together * a.group() + count / h.together * h.group()); }
  int64_t quads(const Map& m) const { return (count / m.together * tiling.count + 3) / 4; }
  int64_t hidden_count() const { return static_cast<int64_t>(hidden.blocks.size()) * quads(a); }
  int64_t output_count() const { return (block.C_out + 31) / 32 * quads(h); }
};

Chunk make_chunk(const ResidualBlock<bf16>& b, const Channels& stream, const Channels& hidden, const Channels& outputs,
                 int64_t start, int64_t count) {
  const Window input{b.H, b.W, b.R / 2, b.S / 2, b.Ho, b.Wo, b.R, b.S, {b.stride, b.stride}};
  const Window between{b.Ho, b.Wo, b.R / 2, b.S / 2, b.Ho, b.Wo, b.R, b.S, {1, 1}};
  return {b,
          start,
          count,
          stream,
          hidden,
          outputs,
          tiling_of(b.Ho, b.Wo),
          make_map(input, stream, count),
          make_map(between, hidden, count),
          nullptr};
}

void clear_maps(const Chunk& c, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    if (j % c.a.together == 0) clear_border(c.a, c.a_of(j));
    if (j % c.h.together == 0) clear_border(c.h, c.h_of(j));
  }
}

KERNEL Pair load_pair(const float* from, int64_t left) {
  const __mmask32 lanes = lanes_of(left);
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16)};
}

// One row of the input map, activated, into scratch.
template <bool affine>
KERNEL void activate_row(const Chunk& c, const bf16* x, bf16* a) {
  const ResidualBlock<bf16>& b = c.block;
  Pair scale{}, shift{};
  if (c.a.unit == 16) {  // all of them: two pixels a vector
    if (affine) {
      scale.low = scale.high = _mm512_loadu_ps(b.scale1);
      shift.low = shift.high = _mm512_loadu_ps(b.shift1);
    }
    const __mmask32 last = lanes_of(b.W % 2 * 16);
    activate_runs<affine>(x, 32, a, 32, b.W / 2, ~0u, ~0u, scale, shift);
    activate_runs<affine>(x + b.W / 2 * 32, 32, a + b.W / 2 * 32, 32, b.W % 2, last, last, scale, shift);
    return;
  }
  for (int64_t k = 0; k < b.C; k += 32) {
    if (affine) {
      scale = load_pair(b.scale1 + k, b.C - k);
      shift = load_pair(b.shift1 + k, b.C - k);
    }
    activate_runs<affine>(x + k, b.C, a + k / 32 * c.a.plane, c.a.pixel(), b.W, lanes_of(b.C - k), lanes_of(c.a.unit),
                          scale, shift);
  }
}

void activate_row(const Chunk& c, int64_t j, int64_t row) {
  const ResidualBlock<bf16>& b = c.block;
  const bf16* x = b.x + (b.route.order[c.start + j] * b.H + row) * b.W * b.C;
  bf16* a = c.a_of(j) + c.a.at(row + c.a.top, c.a.left);
  if (b.scale1)
    activate_row<true>(c, x, a);
  else
    activate_row<false>(c, x, a);
}

// relu(sum + bias) into the hidden map. Channels of the block that are not selected become zeros.
template <int outputs>
KERNEL void finish_hidden(const Chunk& c, const Place& at, int64_t slot, const float* sums) {
  const ResidualBlock<bf16>& b = c.block;
  const int64_t together = c.a.together, step = c.h.pixel(), sums_step = together * outputs * 16;
  const int64_t channel = c.hidden.blocks[slot].index * 32;
  const Pair bias = load_pair(b.bias1 + channel, b.M - channel);
  const __mmask32 live = c.hidden.blocks[slot].lanes, written = lanes_of(c.h.unit);
  for (int64_t f = 0; f < together; ++f) {
    bf16* h = c.h_of(at.group * together + f) + slot * c.h.plane;
    h += c.h.at(at.row + c.h.top, at.column + c.h.left);
    const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
    for (; s != end; h += step, s += sums_step) {
      const Pair sum = {_mm512_load_ps(s), outputs == 2 ? _mm512_load_ps(s + 16) : _mm512_setzero_ps()};
      _mm512_mask_storeu_epi16(h, written, _mm512_maskz_mov_epi16(live, rounded(relu(add(sum, bias)))));
    }
  }
}

// Sums added to the shortcut, rounded once.
template <int outputs>
KERNEL void finish_output(const Chunk& c, const Place& at, int64_t slot, const float* sums) {
  const ResidualBlock<bf16>& b = c.block;
  const int64_t together = c.h.together, step = b.C_out, sums_step = together * outputs * 16, channel = slot * 32;
  const Pair bias = b.bias2 ? load_pair(b.bias2 + channel, outputs * 16) : Pair{};
  for (int64_t f = 0; f < together; ++f) {
    const int64_t instance = b.route.order[c.start + at.group * together + f];
    const int64_t first = ((instance * b.Ho + at.row) * b.Wo + at.column) * b.C_out + channel;
    const bf16* shortcut = b.shortcut + first;
    bf16* out = b.out + first;
    const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
    for (; s != end; shortcut += step, out += step, s += sums_step) {
      if constexpr (outputs == 2) {
        const Pair sum = add({_mm512_load_ps(s), _mm512_load_ps(s + 16)}, bias);
        _mm512_storeu_si512(out, rounded(add(sum, widen(_mm512_loadu_si512(shortcut)))));
      } else {  // half a vector: a masked store would stall the next pixel's load
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(s), bias.low);
        const __m512 x = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(shortcut)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded(_mm512_add_ps(sum, x)));
      }
    }
  }
}

struct FinishHidden {
  const Chunk& chunk;
  template <int outputs>
  KERNEL void run(const Place& at, int64_t slot, const float* sums) const {
    finish_hidden<outputs>(chunk, at, slot, sums);
  }
};

struct FinishOutput {
  const Chunk& chunk;
  template <int outputs>
  KERNEL void run(const Place& at, int64_t slot, const float* sums) const {
    finish_output<outputs>(chunk, at, slot, sums);
  }
};

void hidden_items(const Chunk& c, int64_t begin, int64_t end) {
  const ResidualBlock<bf16>& b = c.block;
  const Convolution conv{c.a,      c.a_of(0), c.count / c.a.together,
                         b.Wo,     b.R,       b.S,
                         b.stride, b.stride,  c.tiling,
                         c.stream, c.hidden,  {b.conv1, steps_of(b.C, b.R, b.S), true}};
  convolve(conv, begin, end, FinishHidden{c});
}

void output_items(const Chunk& c, int64_t begin, int64_t end) {
  const ResidualBlock<bf16>& b = c.block;
  const Section section = section_of(b.conv2, widths_of(b.sizes, b.M), c.hidden.end, b.C_out, b.R, b.S);
  const Convolution conv{c.h,       c.h_of(0), c.count / c.h.together, b.Wo, b.R, b.S, 1, 1, c.tiling, c.hidden,
                         c.outputs, section};
  convolve(conv, begin, end, FinishOutput{c});
}

#pragma GCC pop_options

bool permitted() {  // the kernel saves tile registers only for a process that asked for them
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

bool has_amx() {
  static const bool has = DEN_KERNELS_HAS_AVX512 && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("amx-bf16") && permitted();
  return has;
}

void dynamic_residual_amx(const ResidualBlock<bf16>& b) {
  const Channels stream = channels_of({{0, b.C}}, b.C, 32), outputs = channels_of({{0, b.C_out}}, b.C_out, 32);
  run_block(b, 32, together_of(b.Wo, 16), [&](int64_t start, int64_t count, const Channels& hidden) {
    return make_chunk(b, stream, hidden, outputs, start, count);
  });
}

#endif

}  // namespace den_kernels
