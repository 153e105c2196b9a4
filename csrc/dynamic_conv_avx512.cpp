// float32 with AVX-512 (direct_conv.h).
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_conv.h"

namespace den_kernels {

void dynamic_conv_avx512(const ConvArguments<float>& p) { run_direct(p); }

}  // namespace den_kernels
#endif
