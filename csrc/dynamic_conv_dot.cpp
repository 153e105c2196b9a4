// bfloat16 with AVX-512's dot products, for a CPU without AMX (direct_conv.h).
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "direct_conv.h"

namespace den_kernels {

void dynamic_conv_dot(const ConvArguments<bf16>& p) { run_direct(p); }

}  // namespace den_kernels
#endif
