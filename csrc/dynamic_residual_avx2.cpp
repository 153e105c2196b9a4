// float32 with AVX2 (direct_residual.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_pack.h"
#include "direct_residual.h"

namespace den_kernels {

void dynamic_residual_avx2(const ResidualBlock<float>& b) { run_direct(b); }

void pack_weights_avx2(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  run_pack(weight, scale, packed, O, taps, I);
}

}  // namespace den_kernels
#endif
