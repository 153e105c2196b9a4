// The residual block in bfloat16 with AMX. As in float32 (dynamic_residual.cpp) a chunk of instances of one level goes
// through the whole block in scratch memory; the inner loop (amx_tiles.h) works on tiles of up to 16 pixels.
//
// A map in scratch memory is [block of 32 channels][row][column][instance][32]: a tile's pixels lie 64 bytes apart, and
// where a row has at most 8 of them, rows of several instances lie together and fill the tile. Rows are padded on the
// left alone: the next row's left border is this row's right one. A map of fewer than 32 channels ("narrow") is
// [row][column][channel]: the S pixels under a row of the kernel are then one run of S * channels inputs, which is cut
// into steps of 32 whatever pixel they belong to.
#include "dynamic_residual.h"

#include <cstring>

#include "dispatch.h"

#if defined(DEN_KERNELS_HAS_AVX512) && __GNUC__ >= 12
#define DEN_KERNELS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_tiles.h"
#endif
#include "direct_chunks.h"

namespace den_kernels {
namespace {

bool is_narrow(int64_t width) { return width < 32; }

// Steps of 32 inputs that a convolution over `width` channels takes.
int64_t steps_of(int64_t width, int64_t R, int64_t S) {
  return is_narrow(width) ? R * ((S * width + 31) / 32) : (width + 31) / 32 * R * S;
}

// Where the weights of level g begin in a packing [narrow levels, then all wide ones][ceil(O / 16)][step][16][16][2]: a
// wide level reads the first steps of the widest, a narrow one's steps are its own.
int64_t section_of(const int64_t* widths, int64_t g, int64_t O, int64_t R, int64_t S) {
  int64_t steps = 0;
  for (int64_t i = 1; i < g; ++i) steps += is_narrow(widths[i]) ? steps_of(widths[i], R, S) : 0;
  return steps * ((O + 15) / 16) * 512;
}

}  // namespace

int64_t packed_size_bf16(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths) {
  const int64_t G = static_cast<int64_t>(widths.size()) - 1;
  return section_of(widths.data(), G, O, R, S) + (O + 15) / 16 * 512 * steps_of(widths[G], R, S);
}

#ifdef DEN_KERNELS_AMX
namespace {

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

// A zero-padded map of `together` interleaved instances in scratch memory. unit: 32 channels, or all of a narrow map.
struct Map {
  int64_t H, W, top, left, columns, together, unit, blocks, plane;
  int64_t group() const { return plane * blocks; }
  int64_t pixel() const { return together * unit; }
  int64_t instance(int64_t j) const { return j / together * group() + j % together * unit; }
  int64_t at(int64_t row, int64_t column) const { return (row * columns + column) * pixel(); }
};

// How the output map of a convolution is cut into tiles: `span` columns of a row, of all interleaved instances.
struct Tiling {
  int64_t span, per_row, count;
};

// How many instances fill a tile together. A narrow or strided map is read from one at a time.
int64_t together_of(int64_t Wo, int64_t count) { return std::max<int64_t>(1, std::min(16 / Wo, count)); }

Tiling tiling_of(const ResidualBlock<bf16>& b) {
  const int64_t pieces = (b.Wo + 15) / 16, span = (b.Wo + pieces - 1) / pieces, per_row = (b.Wo + span - 1) / span;
  return {span, per_row, b.Ho * per_row};
}

Map make_map(const ResidualBlock<bf16>& b, int64_t H, int64_t W, int64_t channels, int64_t count, int64_t stride) {
  const int64_t together = is_narrow(channels) || stride > 1 ? 1 : together_of(b.Wo, count);
  const int64_t unit = is_narrow(channels) ? channels : 32, columns = W + b.S / 2, rows = H + b.R - 1;
  const Tiling tiling = tiling_of(b);
  const int64_t read = ((b.Ho - 1) * stride + b.R - 1) * columns + (tiling.per_row * tiling.span - 1) * stride + b.S;
  const int64_t pixels = std::max(rows * columns + b.S / 2, read);
  const int64_t plane = round_up(pixels * together * unit + 32, 32);
  return {H, W, b.R / 2, b.S / 2, columns, together, unit, (channels + 31) / 32, plane};
}

// What the two convolutions of one chunk share.
struct Chunk {
  const ResidualBlock<bf16>& block;
  int64_t start, count, width;
  Tiling tiling;
  Map a, h;
  bf16* scratch;
  bf16* a_of(int64_t j) const { return scratch + a.instance(j); }
  bf16* h_of(int64_t j) const { return scratch + count / a.together * a.group() + h.instance(j); }
  int64_t bytes() const { return 2 * (count / a.together * a.group() + count / h.together * h.group()); }
  int64_t quads(const Map& m) const { return (count / m.together * tiling.count + 3) / 4; }
  int64_t hidden_count() const { return (width + 31) / 32 * quads(a); }
  int64_t output_count() const { return (block.C_out + 31) / 32 * quads(h); }
};

Chunk make_chunk(const ResidualBlock<bf16>& b, int64_t start, int64_t count, int64_t width) {
  return {b, start, count, width, tiling_of(b), make_map(b, b.H, b.W, b.C, count, b.stride),
          make_map(b, b.Ho, b.Wo, width, count, 1), nullptr};
}

KERNEL void clear(bf16* from, int64_t count) { std::memset(from, 0, static_cast<size_t>(count) * 2); }

// Zeros around the map of a group of instances. Beyond the last row they go on for a step: a narrow map's steps
// overrun their row, and zero weights do not silence a NaN.
void clear_border(const Map& m, bf16* group) {
  for (int64_t block = 0; block < m.blocks; ++block) {
    bf16* plane = group + block * m.plane;
    clear(plane, m.at(m.top, m.left));
    for (int64_t r = 1; r < m.H; ++r) clear(plane + m.at(m.top + r, 0), m.left * m.pixel());
    clear(plane + m.at(m.top + m.H, 0), m.at(m.top, m.left) + 32);
  }
}

void clear_maps(const Chunk& c, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    if (j % c.a.together == 0) clear_border(c.a, c.a_of(j));
    if (j % c.h.together == 0) clear_border(c.h, c.h_of(j));
  }
}

KERNEL __mmask32 lanes_of(int64_t left) { return left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1; }

KERNEL Pair load_pair(const float* from, int64_t left) {
  const __mmask32 lanes = lanes_of(left);
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16)};
}

KERNEL Pair relu(const Pair& v) {
  return {_mm512_max_ps(_mm512_setzero_ps(), v.low), _mm512_max_ps(_mm512_setzero_ps(), v.high)};
}

// count runs of up to 32 values, one every `from_step` and `to_step` elements, activated.
template <bool affine>
KERNEL void activate_runs(const bf16* from, int64_t from_step, bf16* to, int64_t to_step, int64_t count,
                          __mmask32 read, __mmask32 written, const Pair& scale, const Pair& shift) {
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

// One row of the input map, activated, into scratch.
template <bool affine>
KERNEL void activate_row(const Chunk& c, const bf16* x, bf16* a) {
  const ResidualBlock<bf16>& b = c.block;
  Pair scale{}, shift{};
  if (is_narrow(b.C)) {  // 16 channels: two pixels a vector
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
    activate_runs<affine>(x + k, b.C, a + k / 32 * c.a.plane, c.a.pixel(), b.W, lanes_of(b.C - k), ~0u, scale, shift);
  }
}

void activate_row(const Chunk& c, int64_t j, int64_t row) {
  const ResidualBlock<bf16>& b = c.block;
  const bf16* x = b.x + (b.order[c.start + j] * b.H + row) * b.W * b.C;
  bf16* a = c.a_of(j) + c.a.at(row + c.a.top, c.a.left);
  if (b.scale1) activate_row<true>(c, x, a);
  else activate_row<false>(c, x, a);
}

KERNEL Pair add(const Pair& x, const Pair& y) { return {_mm512_add_ps(x.low, y.low), _mm512_add_ps(x.high, y.high)}; }

// Where a tile of sums lies on the output map.
struct Place {
  int64_t group, row, column, live;
};

// relu(sum + bias) into the hidden map. Channels beyond the width become zeros.
template <int outputs>
KERNEL void finish_hidden(const Chunk& c, const Place& at, int64_t channel, const float* sums) {
  const ResidualBlock<bf16>& b = c.block;
  const int64_t together = c.a.together, step = c.h.pixel(), sums_step = together * outputs * 16;
  const Pair bias = load_pair(b.bias1 + channel, b.M - channel);
  const __mmask32 live = lanes_of(c.width - channel), written = lanes_of(c.h.unit);
  for (int64_t f = 0; f < together; ++f) {
    bf16* h = c.h_of(at.group * together + f) + channel / 32 * c.h.plane;
    h += c.h.at(at.row + c.h.top, at.column + c.h.left);
    const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
    for (; s != end; h += step, s += sums_step) {
      const Pair sum = {_mm512_load_ps(s), outputs == 2 ? _mm512_load_ps(s + 16) : _mm512_setzero_ps()};
      _mm512_mask_storeu_epi16(h, written, _mm512_maskz_mov_epi16(live, rounded(relu(add(sum, bias)))));
    }
  }
}

// Sums added into the residual stream, rounded once.
template <int outputs>
KERNEL void finish_output(const Chunk& c, const Place& at, int64_t channel, const float* sums) {
  const ResidualBlock<bf16>& b = c.block;
  const int64_t together = c.h.together, step = b.C_out, sums_step = together * outputs * 16;
  const Pair bias = b.bias2 ? load_pair(b.bias2 + channel, outputs * 16) : Pair{};
  for (int64_t f = 0; f < together; ++f) {
    const int64_t instance = b.order[c.start + at.group * together + f];
    bf16* out = b.out + ((instance * b.Ho + at.row) * b.Wo + at.column) * b.C_out + channel;
    const float *s = sums + f * outputs * 16, *end = s + at.live * sums_step;
    for (; s != end; out += step, s += sums_step) {
      if constexpr (outputs == 2) {
        const Pair sum = add({_mm512_load_ps(s), _mm512_load_ps(s + 16)}, bias);
        _mm512_storeu_si512(out, rounded(add(sum, widen(_mm512_loadu_si512(out)))));
      } else {  // half a vector: a masked store would stall the next pixel's load
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(s), bias.low);
        const __m512 x = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(out)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded(_mm512_add_ps(sum, x)));
      }
    }
  }
}

// Four tiles, or what is left of them, of one convolution: `outputs` tiles of channels from `channel`.
template <int outputs, bool hidden>
void four_tiles(const Chunk& c, int64_t tile, int64_t channel, const int64_t* taps, int64_t tap_count, int64_t blocks,
                const bf16* weight, int64_t weight_tile) {
  constexpr int at_once = 4 / outputs;
  const Map& m = hidden ? c.a : c.h;
  const int64_t stride = hidden ? c.block.stride : 1, tiles = c.count / m.together * c.tiling.count;
  alignas(64) float sums[4 * 256];
  for (int64_t last = std::min(tile + 4, tiles); tile < last; tile += at_once) {
    Place places[at_once];
    const bf16* pixels[4];
    for (int i = 0; i < at_once; ++i) {
      const int64_t n = std::min(tile + i, last - 1), in_group = n % c.tiling.count;
      const int64_t column = in_group % c.tiling.per_row * c.tiling.span, left = c.block.Wo - column;
      places[i] = {n / c.tiling.count, in_group / c.tiling.per_row, column, std::min(left, c.tiling.span)};
      const bf16* group = (hidden ? c.a_of(0) : c.h_of(0)) + places[i].group * m.group();
      pixels[i] = group + m.at(places[i].row * stride, column * stride);
    }
    sum_tiles<outputs>(sums, pixels, m.unit * stride * 2, blocks, m.plane, taps, tap_count, weight, weight_tile);
    for (int i = 0; i < at_once && tile + i < last; ++i) {
      if (hidden) finish_hidden<outputs>(c, places[i], channel, sums + i * outputs * 256);
      else finish_output<outputs>(c, places[i], channel, sums + i * outputs * 256);
    }
  }
}

// Items begin..end of a convolution: for each 32 output channels, four tiles at a time.
template <bool hidden>
void convolve(const Chunk& c, int64_t begin, int64_t end) {
  const ResidualBlock<bf16>& b = c.block;
  const Map& m = hidden ? c.a : c.h;
  const int64_t inputs = hidden ? b.C : c.width, channels = hidden ? c.width : b.C_out;
  int64_t taps[max_taps], tap_count = 0;
  const int64_t per_row = is_narrow(inputs) ? (b.S * inputs + 31) / 32 : b.S;
  for (int64_t r = 0; r < b.R; ++r)
    for (int64_t s = 0; s < per_row; ++s) taps[tap_count++] = m.at(r, 0) + s * (is_narrow(inputs) ? 32 : m.pixel());
  const bf16* weights = b.conv1;
  int64_t steps = steps_of(b.C, b.R, b.S);
  if (!hidden) {
    int64_t g = 1;
    while (b.widths[g] != c.width) ++g;
    weights = b.conv2 + section_of(b.widths, g, b.C_out, b.R, b.S);
    steps = steps_of(is_narrow(c.width) ? c.width : b.M, b.R, b.S);
  }
  configure_tiles(c.tiling.span * m.together);
  for (int64_t i = begin, quads = c.quads(m); i < end; ++i) {
    const int64_t channel = i / quads * 32, tile = i % quads * 4;
    const bf16* weight = weights + channel / 16 * steps * 512;
    const auto run = channels - channel > 16 ? four_tiles<2, hidden> : four_tiles<1, hidden>;
    run(c, tile, channel, taps, tap_count, m.blocks, weight, steps * 512);
  }
  _tile_release();
}

void hidden_items(const Chunk& c, int64_t begin, int64_t end) { convolve<true>(c, begin, end); }
void output_items(const Chunk& c, int64_t begin, int64_t end) { convolve<false>(c, begin, end); }

#pragma GCC pop_options

// One step of 32 inputs x 16 outputs of a convolution over the first `width` input channels.
void pack_step(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S, int64_t I,
               int64_t width, int64_t tile, int64_t step) {
  const int64_t row_steps = (S * width + 31) / 32, outputs = std::min<int64_t>(16, O - tile * 16);
  std::fill_n(packed, 512, bf16{0});
  for (int64_t k = 0; k < 32; ++k) {
    int64_t tap = step % (R * S), channel = step / (R * S) * 32 + k;
    if (is_narrow(width)) {
      const int64_t run = step % row_steps * 32 + k;
      tap = step / row_steps * S + run / width;
      channel = run < S * width ? run % width : width;
    }
    if (channel >= width) continue;
    for (int64_t q = 0, o = tile * 16; q < outputs; ++q, ++o)
      narrow(widen(weight[(o * R * S + tap) * I + channel]) * (scale ? scale[o] : 1.f),
             packed[(k / 2 * 16 + q) * 2 + k % 2]);
  }
}

bool permitted() {  // the kernel saves tile registers only for a process that asked for them
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace

bool has_dynamic_residual_bf16() {
  static const bool has = DEN_KERNELS_HAS_AVX512 && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("amx-bf16") && permitted();
  return has;
}

void pack_weights_bf16(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                       const std::vector<int64_t>& widths) {
  const int64_t G = static_cast<int64_t>(widths.size()) - 1, I = widths[G], tiles = (O + 15) / 16;
  for (int64_t g = 1; g <= G; ++g) {
    if (!is_narrow(widths[g]) && g < G) continue;
    const int64_t steps = steps_of(widths[g], R, S);
    bf16* section = packed + section_of(widths.data(), g, O, R, S);
#pragma omp parallel for schedule(static) if (tiles * steps > 32)
    for (int64_t n = 0; n < tiles * steps; ++n)
      pack_step(weight, scale, section + n * 512, O, R, S, I, widths[g], n / steps, n % steps);
  }
}

void dynamic_residual(const ResidualBlock<bf16>& b) {
  check_block(b);
  const int64_t threads = omp_get_max_threads();
  const auto make = [&b](int64_t start, int64_t count, int64_t width) { return make_chunk(b, start, count, width); };
  run_chunks(make_chunks(b, threads, together_of(b.Wo, 16), make), threads);
}

#else

bool has_dynamic_residual_bf16() { return false; }

void pack_weights_bf16(const bf16*, const float*, bf16*, int64_t, int64_t, int64_t,
                       const std::vector<int64_t>&) {
  throw std::runtime_error("pack_weights_bf16: this build has no AMX variant");
}

void dynamic_residual(const ResidualBlock<bf16>&) {
  throw std::runtime_error("dynamic_residual: this build has no AMX variant");
}

#endif

}  // namespace den_kernels
