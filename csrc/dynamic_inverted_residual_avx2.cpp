// float32 with AVX2 (direct_inverted_residual.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_inverted_residual.h"

namespace den_kernels {

void dynamic_inverted_residual_avx2(const InvertedResidual& p) { run_direct(p); }

}  // namespace den_kernels
#endif
