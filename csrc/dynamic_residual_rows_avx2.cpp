// float32 with AVX2 (direct_rows.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_rows.h"

namespace den_kernels {

void dynamic_residual_rows_avx2(const ResidualBlock<float>& b) { run_rows(b); }

}  // namespace den_kernels
#endif
