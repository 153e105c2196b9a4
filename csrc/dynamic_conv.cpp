// float32 (direct_conv.h).
#include "dynamic_conv.h"

#include <stdexcept>

#include "dispatch.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_conv.h"
#endif

namespace den_kernels {

#ifdef DEN_KERNELS_HAS_AVX512

void dynamic_conv(const ConvArguments<float>& p) { run_direct(p); }

#else

void dynamic_conv(const ConvArguments<float>&) {
  throw std::runtime_error("dynamic_conv: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
