// vectors.h in AVX-512: 32 registers of 16 lanes.
#pragma once

namespace den_kernels {
namespace {

// A tile of a convolution sums in 24 or 28 registers: two vectors of output channels of three strips of four pixels, or
// of two of seven where these fill rows that fours do not (of 7 or 14 pixels); or one vector of twice as many.
constexpr int tile_vectors = 2;
constexpr int tile_steps = 1;  // channels of a turn of the loop
constexpr int usual_strip = 4, other_strip = 7;
constexpr int64_t strip_size(int64_t columns) { return columns % 4 && columns % 7 == 0 ? 7 : 4; }
constexpr int sum_vectors = 28;                 // the vectors that may sum at once
constexpr int plane_vectors(int) { return 4; }  // vectors of pixels, by outputs that are summed at once
constexpr bool spread_maps = false;             // the maps of a residual block (`spread`)
constexpr int gradient_inputs(int vectors) { return 16 / vectors; }  // of a tile of a weight gradient
constexpr int rows_pixels = 6, rows_span = 512;  // pixels of four outputs and inputs at once, of unpacked weights
constexpr int depthwise_pixels = 8;  // pixels of a vector of channels that a depthwise convolution sums at once

#pragma GCC push_options
DEN_KERNELS_TARGET

using Vector = __m512;
using Lanes = __mmask16;

KERNEL Vector load16(const float* from) { return _mm512_loadu_ps(from); }
KERNEL Vector load16(const float* from, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
KERNEL void store16(float* to, Vector v) { _mm512_storeu_ps(to, v); }
KERNEL void store16(float* to, Vector v, Lanes lanes) { _mm512_mask_storeu_ps(to, lanes, v); }

KERNEL Vector zeros() { return _mm512_setzero_ps(); }
KERNEL Vector broadcast(float value) { return _mm512_set1_ps(value); }
KERNEL Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
KERNEL Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
KERNEL Vector fma(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
KERNEL Vector at_least(Vector least, Vector v) { return _mm512_max_ps(least, v); }  // a NaN passes
KERNEL Vector relu(Vector v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }      // a NaN passes
KERNEL Vector at_most(Vector most, Vector v) { return _mm512_min_ps(most, v); }     // a NaN passes
KERNEL Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
KERNEL Vector nearest(Vector v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KERNEL Vector power_of_two(Vector n) {  // of whole numbers -126 .. 127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
KERNEL Vector keep(Vector v, Lanes lanes) { return _mm512_maskz_mov_ps(lanes, v); }

// Lane `k` of the lane's own group of `unit` lanes, a divisor of 8, and the 16 values at `from` in such an order.
using Order = __m512i;
KERNEL Order lane_of_group(int64_t unit, int64_t k) {
  const __m512i own = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_and_si512(own, _mm512_set1_epi32(static_cast<int>(-unit))),
                          _mm512_set1_epi32(static_cast<int>(k)));
}
KERNEL Vector load_ordered(const float* from, Order order) { return _mm512_permutexvar_ps(order, load16(from)); }

// The selected lanes, without gaps.
KERNEL void store_selected(float* to, Vector v, Lanes lanes) {
  _mm512_mask_storeu_ps(to, static_cast<Lanes>(_pext_u32(lanes, lanes)), _mm512_maskz_compress_ps(lanes, v));
}

// A 16 x 16 tile, one row a vector, transposed.
KERNEL void transpose16(Vector (&r)[16]) {
  Vector t[16], u[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) {
    UNROLL for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(t[i + k]), high = _mm512_castps_pd(t[i + k + 2]);
      u[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      u[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    const Vector a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x44), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xEE);
    const Vector c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x44),
                 d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xEE);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + i] = _mm512_shuffle_f32x4(a, c, 0xDD);
    r[8 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

// A register, where sums go along the lanes.
using Register = __m512;
constexpr int register_lanes = 16;

KERNEL Register zero_register() { return _mm512_setzero_ps(); }
KERNEL Register fma_register(Register a, Register b, Register sum) { return _mm512_fmadd_ps(a, b, sum); }
KERNEL Register load_first(const float* from, int64_t count) {  // and zeros behind these
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1), from);
}

// The sums of the lanes of four registers.
KERNEL __m128 add_lanes(Register a, Register b, Register c, Register d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
  const __m512 quads =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 pairs = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// The first `count` of four values.
KERNEL __m128 load_quad(const float* from, int64_t count) {
  return _mm_maskz_loadu_ps(static_cast<__mmask8>((1u << count) - 1), from);
}
KERNEL void store_quad(float* to, __m128 v, int64_t count) {
  _mm_mask_storeu_ps(to, static_cast<__mmask8>((1u << count) - 1), v);
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
