// bfloat16 with AVX-512's dot products, for a CPU without AMX (direct_gradient.h).
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "direct_gradient.h"

namespace den_kernels {

void dynamic_conv_weight_gradient_dot(const ConvArguments<bf16>& p, const bf16* grad, bf16* dweight) {
  run_weight_gradient(p, grad, dweight);
}

}  // namespace den_kernels
#endif
