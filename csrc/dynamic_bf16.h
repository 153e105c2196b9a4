// The two ways of bfloat16 on a CPU: AMX tiles, and AVX-512's dot products of pairs. dynamic_bf16.cpp chooses; each has
// a packing of the weights.
#pragma once

#include <cstdint>
#include <vector>

#include "dynamic_conv.h"
#include "dynamic_residual.h"

namespace den_kernels {

bool has_amx();
void dynamic_residual_amx(const ResidualBlock<bf16>& block);
void dynamic_conv_amx(const ConvArguments<bf16>& arguments);
void dynamic_conv_weight_gradient_amx(const ConvArguments<bf16>& arguments, const bf16* grad, bf16* dweight);

bool has_dot_bf16();
void dynamic_residual_dot(const ResidualBlock<bf16>& block);
void dynamic_residual_rows_dot(const ResidualBlock<bf16>& block);  // weights that are not all packed
void dynamic_conv_dot(const ConvArguments<bf16>& arguments);
void pack_weights_dot(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t taps, int64_t I);
void pack_turned_weights_dot(const bf16* weight, bf16* packed, int64_t O, int64_t taps, int64_t I);
void dynamic_conv_weight_gradient_dot(const ConvArguments<bf16>& arguments, const bf16* grad, bf16* dweight);

// "AMX", "AVX-512 BF16" or "", by which the functions of dynamic_residual.h and dynamic_conv.h run here.
const char* bf16_isa();

// weight [O, R, S, I], times scale [O] unless that is null -> what they read, packed_size_bf16 values. widths: [G + 1],
// of the levels, for convolutions over the prefixes of I that they keep.
void pack_weights_bf16(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                       const std::vector<int64_t>& widths);
// pack_weights_bf16 for the transposed convolution, inputs and outputs swapped and the last tap first. widths: of the
// levels of O.
void pack_turned_weights_bf16(const bf16* weight, bf16* packed, int64_t R, int64_t S, int64_t I,
                              const std::vector<int64_t>& widths);

int64_t packed_size_bf16(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths);

}  // namespace den_kernels
