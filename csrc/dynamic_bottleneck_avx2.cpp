// float32 with AVX2 (direct_bottleneck.h).
#define DEN_KERNELS_AVX2
#include "dispatch.h"
#include "dynamic_float32.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_bottleneck.h"

namespace den_kernels {

void dynamic_bottleneck_avx2(const BottleneckArguments<float>& p) { run_direct(p); }

}  // namespace den_kernels
#endif
