#include "dynamic_bf16.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "amx_pack.h"
#include "check.h"
#include "dispatch.h"

namespace den_kernels {
namespace {

// The weights of the transposed convolution: [O, taps, I] -> [I, taps, O], the last tap first.
void turn(const bf16* weight, bf16* turned, int64_t O, int64_t taps, int64_t I) {
  constexpr int64_t block = 32;  // side of a square block: its rows and its columns stay in the cache
#pragma omp parallel for schedule(static) if (O * taps * I > 16384)
  for (int64_t i0 = 0; i0 < I; i0 += block)
    for (int64_t o0 = 0; o0 < O; o0 += block)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t i = i0; i < std::min(i0 + block, I); ++i)
          for (int64_t o = o0; o < std::min(o0 + block, O); ++o)
            turned[(i * taps + taps - 1 - t) * O + o] = weight[(o * taps + t) * I + i];
}

void check_instructions(const char* op) {
  if (!has_direct_bf16()) throw std::runtime_error(std::string(op) + ": this CPU has no bfloat16 instructions");
}

}  // namespace

#ifdef DEN_KERNELS_AMX
bool has_dot_bf16() { return DEN_KERNELS_HAS_AVX512 && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_amx() { return false; }
bool has_dot_bf16() { return false; }
void dynamic_residual_amx(const ResidualBlock<bf16>&) {}
void dynamic_residual_dot(const ResidualBlock<bf16>&) {}
void dynamic_residual_rows_dot(const ResidualBlock<bf16>&) {}
void dynamic_conv_amx(const ConvArguments<bf16>&) {}
void dynamic_conv_dot(const ConvArguments<bf16>&) {}
void pack_weights_dot(const bf16*, const float*, bf16*, int64_t, int64_t, int64_t) {}
void pack_turned_weights_dot(const bf16*, bf16*, int64_t, int64_t, int64_t) {}
void dynamic_conv_weight_gradient_amx(const ConvArguments<bf16>&, const bf16*, bf16*) {}
void dynamic_conv_weight_gradient_dot(const ConvArguments<bf16>&, const bf16*, bf16*) {}
#endif

const char* bf16_isa() { return has_amx() ? "AMX" : has_dot_bf16() ? "AVX-512 BF16" : ""; }

bool has_direct_bf16() { return has_amx() || has_dot_bf16(); }

void dynamic_residual(const ResidualBlock<bf16>& b) {
  check_instructions("dynamic_residual");
  if (b.scale2 || b.unpacked2) return dynamic_residual_rows_dot(b);
  has_amx() ? dynamic_residual_amx(b) : dynamic_residual_dot(b);
}

void dynamic_conv(const ConvArguments<bf16>& p) {
  check_instructions("dynamic_conv");
  check(p.C % 16 == 0 && p.C_out % 16 == 0, "dynamic_conv", "channels", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, "dynamic_conv", "dilation", "1", p.dilation[0]);
  has_amx() ? dynamic_conv_amx(p) : dynamic_conv_dot(p);
}

void dynamic_conv_weight_gradient(const ConvArguments<bf16>& p, const bf16* grad, bf16* dweight) {
  check_instructions("dynamic_conv");
  check(p.C % 16 == 0 && p.C_out % 16 == 0, "dynamic_conv", "channels", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, "dynamic_conv", "dilation", "1", p.dilation[0]);
  if (!has_amx()) return dynamic_conv_weight_gradient_dot(p, grad, dweight);
  check(p.stride[0] == 1 && p.stride[1] == 1, "dynamic_conv", "stride with AMX", "1",
        std::max(p.stride[0], p.stride[1]));
  dynamic_conv_weight_gradient_amx(p, grad, dweight);
}

int64_t packed_size_bf16(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths) {
  return has_amx() ? amx_packed_size(O, R, S, widths) : (O + 15) / 16 * ((widths.back() + 31) / 32) * R * S * 512;
}

void pack_weights_bf16(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                       const std::vector<int64_t>& widths) {
  check_instructions("pack_weights");
  if (has_amx())
    amx_pack_weights(weight, scale, packed, O, R, S, widths);
  else
    pack_weights_dot(weight, scale, packed, O, R * S, widths.back());
}

void pack_turned_weights_bf16(const bf16* weight, bf16* packed, int64_t R, int64_t S, int64_t I,
                              const std::vector<int64_t>& widths) {
  check_instructions("pack_turned_weights");
  const int64_t O = widths.back();
  if (!has_amx()) return pack_turned_weights_dot(weight, packed, O, R * S, I);
  const std::unique_ptr<bf16[]> turned(new bf16[static_cast<size_t>(O * R * S * I)]);
  turn(weight, turned.get(), O, R * S, I);
  amx_pack_weights(turned.get(), nullptr, packed, I, R, S, widths);
}

}  // namespace den_kernels
