// The float32 block (direct_residual.h), and its weights.
#include "dynamic_residual.h"

#include <algorithm>

#include "dispatch.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_residual.h"
#endif

namespace den_kernels {

void pack_turned_weights(const float* weight, float* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t i = 0; i < I_blocks; ++i)
    for (int64_t o = 0; o < O_blocks; ++o) {
      const int64_t outputs = std::min<int64_t>(16, O - o * 16), inputs = std::min<int64_t>(16, I - i * 16);
      for (int64_t t = 0; t < taps; ++t) {
        float* to = packed + ((i * O_blocks + o) * taps + t) * 256;
        if (outputs < 16 || inputs < 16) std::fill_n(to, 256, 0.f);
        for (int64_t q = 0; q < outputs; ++q)
          std::copy_n(weight + ((o * 16 + q) * taps + taps - 1 - t) * I + i * 16, inputs, to + q * 16);
      }
    }
}

#ifdef DEN_KERNELS_HAS_AVX512

#pragma GCC push_options
DEN_KERNELS_TARGET

// 16 inputs of `outputs` outputs of a tap, `step` floats from one to the next, times their scale.
static void pack_tile(const float* from, int64_t step, int64_t outputs, __mmask16 inputs, const float* scale,
                      float* to) {
  __m512 tile[16];
  UNROLL for (int q = 0; q < 16; ++q) {
    tile[q] = q < outputs ? load16(from + q * step, inputs) : _mm512_setzero_ps();
    if (scale && q < outputs) tile[q] = _mm512_mul_ps(tile[q], _mm512_set1_ps(scale[q]));
  }
  transpose16(tile);
  UNROLL for (int k = 0; k < 16; ++k) _mm512_storeu_ps(to + k * 16, tile[k]);
}

#pragma GCC pop_options

void pack_weights(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t o = 0; o < O_blocks; ++o)
    for (int64_t i = 0; i < I_blocks; ++i)
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t left = I - i * 16;
        const __mmask16 inputs = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1);
        pack_tile(weight + (o * 16 * taps + t) * I + i * 16, taps * I, O - o * 16, inputs,
                  scale ? scale + o * 16 : scale, packed + ((o * I_blocks + i) * taps + t) * 256);
      }
}

bool has_direct_float32() { return DEN_KERNELS_HAS_AVX512; }

void dynamic_residual(const ResidualBlock<float>& b) {
  b.scale2 || b.unpacked2 ? dynamic_residual_rows(b) : run_direct(b);
}

#else

void pack_weights(const float*, const float*, float*, int64_t, int64_t, int64_t) {
  throw std::runtime_error("dynamic_residual: this build has no AVX-512 variant");
}

bool has_direct_float32() { return false; }

void dynamic_residual(const ResidualBlock<float>&) {
  throw std::runtime_error("dynamic_residual: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
