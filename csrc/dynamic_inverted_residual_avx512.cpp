// float32 with AVX-512 (direct_inverted_residual.h).
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_inverted_residual.h"

namespace den_kernels {

void dynamic_inverted_residual_avx512(const InvertedResidual& p) { run_direct(p); }

}  // namespace den_kernels
#endif
