// float32 with AVX-512 (direct_rows.h).
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_rows.h"

namespace den_kernels {

void dynamic_residual_rows_avx512(const ResidualBlock<float>& b) { run_rows(b); }

}  // namespace den_kernels
#endif
