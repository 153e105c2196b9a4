// The bfloat16 block with AVX-512's dot products, for a CPU without AMX (direct_residual.h).
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "direct_residual.h"

namespace den_kernels {

void dynamic_residual_dot(const ResidualBlock<bf16>& b) { run_direct(b); }

}  // namespace den_kernels
#endif
