#include "dynamic_bf16.h"

#include <algorithm>
#include <stdexcept>

#include "amx_pack.h"
#include "check.h"
#include "dispatch.h"

namespace den_kernels {
namespace {

// [ceil(O / 16)][ceil(I / 32)][tap][16 pairs of I][16 of O][2], zeros beyond O and I: the float32 packing, in pairs.
void pack_pairs(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 31) / 32;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t o = 0; o < O_blocks; ++o)
    for (int64_t i = 0; i < I_blocks; ++i) {
      const int64_t outputs = std::min<int64_t>(16, O - o * 16), inputs = std::min<int64_t>(32, I - i * 32);
      for (int64_t t = 0; t < taps; ++t) {
        bf16* to = packed + ((o * I_blocks + i) * taps + t) * 512;
        std::fill_n(to, 512, bf16{0});
        for (int64_t q = 0; q < outputs; ++q)
          for (int64_t k = 0; k < inputs; ++k) {
            const bf16 from = weight[((o * 16 + q) * taps + t) * I + i * 32 + k];
            narrow(widen(from) * (scale ? scale[o * 16 + q] : 1.f), to[(k / 2 * 16 + q) * 2 + k % 2]);
          }
      }
    }
}

}  // namespace

#ifdef DEN_KERNELS_AMX
bool has_dot_bf16() { return DEN_KERNELS_HAS_AVX512 && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_amx() { return false; }
bool has_dot_bf16() { return false; }
void dynamic_residual_amx(const ResidualBlock<bf16>&) {}
void dynamic_residual_dot(const ResidualBlock<bf16>&) {}
void dynamic_conv_amx(const ConvArguments<bf16>&) {}
void dynamic_conv_dot(const ConvArguments<bf16>&) {}
void dynamic_conv_weight_gradient_amx(const ConvArguments<bf16>&, const bf16*, bf16*) {}
void dynamic_conv_weight_gradient_dot(const ConvArguments<bf16>&, const bf16*, bf16*) {}
#endif

const char* bf16_isa() { return has_amx() ? "AMX" : has_dot_bf16() ? "AVX-512 BF16" : ""; }

bool has_direct_bf16() { return has_amx() || has_dot_bf16(); }

void dynamic_residual(const ResidualBlock<bf16>& b) {
  if (!has_direct_bf16()) throw std::runtime_error("dynamic_residual: this CPU has no bfloat16 instructions");
  has_amx() ? dynamic_residual_amx(b) : dynamic_residual_dot(b);
}

void dynamic_conv(const ConvArguments<bf16>& p) {
  if (!has_direct_bf16()) throw std::runtime_error("dynamic_conv: this CPU has no bfloat16 instructions");
  check(p.C % 16 == 0 && p.C_out % 16 == 0, "dynamic_conv", "channels", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, "dynamic_conv", "dilation", "1", p.dilation[0]);
  has_amx() ? dynamic_conv_amx(p) : dynamic_conv_dot(p);
}

void dynamic_conv_weight_gradient(const ConvArguments<bf16>& p, const bf16* grad, bf16* dweight) {
  if (!has_direct_bf16()) throw std::runtime_error("dynamic_conv: this CPU has no bfloat16 instructions");
  check(p.C % 16 == 0 && p.C_out % 16 == 0, "dynamic_conv", "channels", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, "dynamic_conv", "dilation", "1", p.dilation[0]);
  if (!has_amx()) return dynamic_conv_weight_gradient_dot(p, grad, dweight);
  check(p.stride[0] == 1 && p.stride[1] == 1, "dynamic_conv", "stride with AMX", "1",
        std::max(p.stride[0], p.stride[1]));
  dynamic_conv_weight_gradient_amx(p, grad, dweight);
}

void turn_weights_bf16(const bf16* weight, bf16* turned, int64_t O, int64_t taps, int64_t I) {
  constexpr int64_t block = 32;  // side of a square block: its rows and its columns stay in the cache
#pragma omp parallel for schedule(static) if (O * taps * I > 16384)
  for (int64_t i0 = 0; i0 < I; i0 += block)
    for (int64_t o0 = 0; o0 < O; o0 += block)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t i = i0; i < std::min(i0 + block, I); ++i)
          for (int64_t o = o0; o < std::min(o0 + block, O); ++o)
            turned[(i * taps + taps - 1 - t) * O + o] = weight[(o * taps + t) * I + i];
}

int64_t packed_size_bf16(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths) {
  return has_amx() ? amx_packed_size(O, R, S, widths) : (O + 15) / 16 * ((widths.back() + 31) / 32) * R * S * 512;
}

void pack_weights_bf16(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                       const std::vector<int64_t>& widths) {
  if (has_amx())
    amx_pack_weights(weight, scale, packed, O, R, S, widths);
  else
    pack_pairs(weight, scale, packed, O, R * S, widths.back());
}

}  // namespace den_kernels
