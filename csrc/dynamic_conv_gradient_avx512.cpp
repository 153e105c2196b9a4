// float32 with AVX-512 (direct_gradient.h).
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_gradient.h"

namespace den_kernels {

void dynamic_conv_weight_gradient_avx512(const ConvArguments<float>& p, const float* grad, float* dweight) {
  run_weight_gradient(p, grad, dweight);
}

}  // namespace den_kernels
#endif
