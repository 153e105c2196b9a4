// float32 with AVX2 (direct_gradient.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_gradient.h"

namespace den_kernels {

void dynamic_conv_weight_gradient_avx2(const ConvArguments<float>& p, const float* grad, float* dweight) {
  run_weight_gradient(p, grad, dweight);
}

}  // namespace den_kernels
#endif
