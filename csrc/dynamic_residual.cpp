// The float32 block (direct_residual.h), and its weights.
#include "dynamic_residual.h"

#include <algorithm>

#include "dispatch.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_residual.h"
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
          for (int64_t k = 0; k < inputs; ++k)
            to[k * 16 + q] = from[q * taps * I + k] * (scale ? scale[o * 16 + q] : 1.f);
      }
    }
}

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

bool has_dynamic_residual() { return DEN_KERNELS_HAS_AVX512; }

void dynamic_residual(const ResidualBlock<float>& b) { run_direct(b); }

#else

bool has_dynamic_residual() { return false; }

void dynamic_residual(const ResidualBlock<float>&) {
  throw std::runtime_error("dynamic_residual: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
