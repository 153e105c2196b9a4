// The two ways of float32 on a CPU, one source compiled for each (vectors.h), with the same packed weights: AVX-512 and
// AVX2. dynamic_float32.cpp chooses.
#pragma once

#include <cstdint>
#include <string>

#include "dynamic_bottleneck.h"
#include "dynamic_conv.h"
#include "dynamic_graph.h"
#include "dynamic_inverted_residual.h"
#include "dynamic_residual.h"

namespace den_kernels {

void dynamic_residual_avx512(const ResidualBlock<float>& block);
void dynamic_residual_rows_avx512(const ResidualBlock<float>& block);  // weights that are not all packed
void dynamic_conv_avx512(const ConvArguments<float>& arguments);
void dynamic_conv_weight_gradient_avx512(const ConvArguments<float>& arguments, const float* grad, float* dweight);
void dynamic_bottleneck_avx512(const BottleneckArguments<float>& arguments);
void dynamic_inverted_residual_avx512(const InvertedResidual& arguments);
void dynamic_graph_avx512(const GraphArguments& arguments);
void pack_weights_avx512(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I);

void dynamic_residual_avx2(const ResidualBlock<float>& block);
void dynamic_residual_rows_avx2(const ResidualBlock<float>& block);
void dynamic_conv_avx2(const ConvArguments<float>& arguments);
void dynamic_conv_weight_gradient_avx2(const ConvArguments<float>& arguments, const float* grad, float* dweight);
void dynamic_bottleneck_avx2(const BottleneckArguments<float>& arguments);
void dynamic_inverted_residual_avx2(const InvertedResidual& arguments);
void dynamic_graph_avx2(const GraphArguments& arguments);
void pack_weights_avx2(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I);

// "AVX-512", "AVX2" or "", by which the functions of dynamic_residual.h, dynamic_conv.h, dynamic_bottleneck.h,
// dynamic_inverted_residual.h and dynamic_graph.h run here: the best that the CPU has, or what limit_float32_isa said.
const char* float32_isa();

// Use at most this instruction set from now on, in all threads: "AVX-512", "AVX2", or "" for none of them, where no
// float32 kernel runs. For tests and measurements.
void limit_float32_isa(const std::string& isa);

}  // namespace den_kernels
