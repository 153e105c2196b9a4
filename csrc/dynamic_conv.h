// Dynamic convolution on a CPU: one direct convolution over the whole batch, each instance with the channels that its
// level keeps. float32 with AVX-512, bfloat16 with AMX.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

#include "numbers.h"

namespace den_kernels {

// out[b, :, :, :O] = conv(x[b, :, :, :I], weight[:O, :I]) + bias[:O] and out[b, :, :, O:] = 0, where I = in_widths[l] and
// O = out_widths[l] for an instance at level l; I = 0 leaves the bias. Maps are channels-last; zero padding.
template <class T>
struct ConvProblem {
  int64_t B, H, W, C;               // input map
  int64_t Ho, Wo, C_out;            // output map
  int64_t R, S;                     // kernel
  int64_t stride[2], padding[2], dilation[2];
  int64_t G;                        // channel groups
  const int64_t* in_widths;         // [G + 1]
  const int64_t* out_widths;        // [G + 1]
  const T* x;                       // [B, H, W, C]
  T* out;                           // [B, Ho, Wo, C_out]
  const int32_t* order;             // [B] sorted by level, descending
  const int32_t* offsets;           // [G + 2] segment s holds level G - s
  const T* weight;                  // packed; float32: by pack_weights, [ceil(C_out / 16), ceil(C / 16), R * S, 16, 16]
  const T* bias;                    // [C_out] or null
};

// Needs AVX-512 (has_dynamic_residual) and a kernel of at most 49 taps.
void dynamic_conv(const ConvProblem<float>& problem);

// Needs AMX (has_dynamic_residual_bf16), a kernel of at most 49 taps, dilation 1, C and C_out divisible by 16, and weights
// packed by pack_weights_bf16 for the in_widths above 0.
void dynamic_conv(const ConvProblem<bf16>& problem);

void bind_dynamic_conv(pybind11::module_& m);

}  // namespace den_kernels
