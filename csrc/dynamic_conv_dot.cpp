// bfloat16 with AVX-512's dot products, for a CPU without AMX (direct_conv.h).
#define DEN_KERNELS_DOT_BF16
#include "dispatch.h"
#include "dynamic_bf16.h"
#ifdef DEN_KERNELS_AMX
#include "direct_conv.h"
#include "direct_pack.h"

namespace den_kernels {

void dynamic_conv_dot(const ConvArguments<bf16>& p) { run_direct(p); }

void pack_weights_dot(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t taps, int64_t I) {
  run_pack(weight, scale, reinterpret_cast<float*>(packed), O, taps, I);
}

void pack_turned_weights_dot(const bf16* weight, bf16* packed, int64_t O, int64_t taps, int64_t I) {
  run_pack_turned(weight, reinterpret_cast<float*>(packed), O, taps, I);
}

}  // namespace den_kernels
#endif
