// vectors.h in AVX2 and FMA: 16 registers of 8 lanes, two of them a vector.
#pragma once

namespace den_kernels {
namespace {

// A tile of a convolution sums in 12 registers: one vector of output channels of six pixels, with two registers of
// weights and one of an input value. In strips of two pixels, or of one where a row's number is odd: its rows need not
// be neighbours, so small maps fill it.
constexpr int tile_vectors = 1;
constexpr int tile_steps = 4;  // channels of a turn of the loop
constexpr int usual_strip = 2, other_strip = 1;
constexpr int64_t strip_size(int64_t columns) { return columns % 2 ? 1 : 2; }
constexpr int sum_vectors = 6;  // the vectors that may sum at once
// Vectors of pixels, by outputs that are summed at once: at least six registers hide how long a sum takes.
constexpr int plane_vectors(int outputs) { return outputs == 1 ? 4 : outputs == 2 ? 2 : 1; }
constexpr bool spread_maps = true;  // the maps of a residual block (`spread`): first-level caches have eight ways
// Inputs of a tile of a weight gradient.
constexpr int gradient_inputs(int) { return 6; }
constexpr int rows_pixels = 2, rows_span = 128;  // pixels of four outputs and inputs at once, of unpacked weights
constexpr int depthwise_pixels = 6;  // pixels of a vector of channels that a depthwise convolution sums at once

#pragma GCC push_options
DEN_KERNELS_TARGET

struct Vector {
  __m256 low, high;
};
using Lanes = uint16_t;

// All bits of the lanes 0..7 that are set in `lanes`.
KERNEL __m256i mask_of(unsigned lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
}

// Half a vector: masked stores are slow on some CPUs, and most selections end at half a vector.
KERNEL void store8(float* to, __m256 v, unsigned lanes) {
  if (lanes == 0xFF) return _mm256_storeu_ps(to, v);
  if (lanes) _mm256_maskstore_ps(to, mask_of(lanes), v);
}

KERNEL Vector load16(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
KERNEL Vector load16(const float* from, Lanes lanes) {
  if (lanes == 0xFFFF) return load16(from);
  return {_mm256_maskload_ps(from, mask_of(lanes & 0xFF)), _mm256_maskload_ps(from + 8, mask_of(lanes >> 8))};
}
KERNEL void store16(float* to, const Vector& v) {
  _mm256_storeu_ps(to, v.low);
  _mm256_storeu_ps(to + 8, v.high);
}
KERNEL void store16(float* to, const Vector& v, Lanes lanes) {
  store8(to, v.low, lanes & 0xFF);
  store8(to + 8, v.high, lanes >> 8);
}

KERNEL Vector zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
KERNEL Vector broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
KERNEL Vector add(const Vector& a, const Vector& b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
KERNEL Vector multiply(const Vector& a, const Vector& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
// sum + a * b in the register of `sum`: GCC, left the choice, moves the sums of an unrolled loop between registers.
KERNEL __m256 fma8(__m256 a, __m256 b, __m256 sum) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
KERNEL Vector fma(const Vector& a, const Vector& b, const Vector& sum) {
  return {fma8(a.low, b.low, sum.low), fma8(a.high, b.high, sum.high)};
}
KERNEL Vector at_least(const Vector& least, const Vector& v) {  // a NaN passes
  return {_mm256_max_ps(least.low, v.low), _mm256_max_ps(least.high, v.high)};
}
KERNEL Vector relu(const Vector& v) {  // a NaN passes
  return {_mm256_max_ps(_mm256_setzero_ps(), v.low), _mm256_max_ps(_mm256_setzero_ps(), v.high)};
}
KERNEL Vector at_most(const Vector& most, const Vector& v) {  // a NaN passes
  return {_mm256_min_ps(most.low, v.low), _mm256_min_ps(most.high, v.high)};
}
KERNEL Vector divide(const Vector& a, const Vector& b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
KERNEL Vector nearest(const Vector& v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.low, mode), _mm256_round_ps(v.high, mode)};
}
KERNEL __m256 power_of_two8(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
KERNEL Vector power_of_two(const Vector& n) { return {power_of_two8(n.low), power_of_two8(n.high)}; }  // -126 .. 127
KERNEL Vector keep(const Vector& v, Lanes lanes) {
  if (lanes == 0xFFFF) return v;
  return {_mm256_and_ps(v.low, _mm256_castsi256_ps(mask_of(lanes & 0xFF))),
          _mm256_and_ps(v.high, _mm256_castsi256_ps(mask_of(lanes >> 8)))};
}

// Lane `k` of the lane's own group of `unit` lanes, a divisor of 8, and the 16 values at `from` in such an order.
using Order = __m256i;  // of either half
KERNEL Order lane_of_group(int64_t unit, int64_t k) {
  const __m256i own = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_add_epi32(_mm256_and_si256(own, _mm256_set1_epi32(static_cast<int>(-unit))),
                          _mm256_set1_epi32(static_cast<int>(k)));
}
KERNEL Vector load_ordered(const float* from, Order order) {
  return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), order),
          _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + 8), order)};
}

// The selected lanes, without gaps.
KERNEL void store_selected(float* to, const Vector& v, Lanes lanes) {
  if (lanes == 0xFFFF) return store16(to, v);
  if (lanes == 0xFF) return _mm256_storeu_ps(to, v.low);
  alignas(32) float values[16];
  store16(values, v);
  for (unsigned left = lanes; left; left &= left - 1) *to++ = values[__builtin_ctz(left)];
}

KERNEL void transpose8(__m256 (&r)[8]) {
  __m256 t[8], u[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int k = 0; k < 2; ++k) {
      u[i + 2 * k] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0x44);
      u[i + 2 * k + 1] = _mm256_shuffle_ps(t[i + k], t[i + k + 2], 0xEE);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
  }
}

// A 16 x 16 tile, one row a vector, transposed, in quarters.
KERNEL void transpose16(Vector (&r)[16]) {
  __m256 quarters[4][8];
  UNROLL for (int i = 0; i < 8; ++i) {
    quarters[0][i] = r[i].low, quarters[1][i] = r[i].high;
    quarters[2][i] = r[8 + i].low, quarters[3][i] = r[8 + i].high;
  }
  UNROLL for (int q = 0; q < 4; ++q) transpose8(quarters[q]);
  UNROLL for (int i = 0; i < 8; ++i) {
    r[i] = {quarters[0][i], quarters[2][i]};
    r[8 + i] = {quarters[1][i], quarters[3][i]};
  }
}

// A register, where sums go along the lanes.
using Register = __m256;
constexpr int register_lanes = 8;

KERNEL Register zero_register() { return _mm256_setzero_ps(); }
KERNEL Register fma_register(Register a, Register b, Register sum) { return _mm256_fmadd_ps(a, b, sum); }
KERNEL Register load_first(const float* from, int64_t count) {  // and zeros behind these
  if (count >= 8) return _mm256_loadu_ps(from);
  return _mm256_maskload_ps(from, mask_of((1u << count) - 1));
}

// The sums of the lanes of four registers.
KERNEL __m128 add_lanes(Register a, Register b, Register c, Register d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1));
}

// The first `count` of four values.
KERNEL __m128 load_quad(const float* from, int64_t count) {
  if (count == 4) return _mm_loadu_ps(from);
  return _mm_maskload_ps(from, _mm256_castsi256_si128(mask_of((1u << count) - 1)));
}
KERNEL void store_quad(float* to, __m128 v, int64_t count) {
  if (count == 4) return _mm_storeu_ps(to, v);
  _mm_maskstore_ps(to, _mm256_castsi256_si128(mask_of((1u << count) - 1)), v);
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
