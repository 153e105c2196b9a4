// bfloat16 with AVX-512's dot products (direct_rows.h).
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "direct_rows.h"

namespace den_kernels {

void dynamic_residual_rows_dot(const ResidualBlock<bf16>& b) { run_rows(b); }

}  // namespace den_kernels
#endif
