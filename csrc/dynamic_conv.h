// Dynamic convolution on a CPU: one direct convolution over the whole batch, each instance with the channels that it
// selected. float32 with AVX-512 or AVX2, bfloat16 with AMX or AVX-512 BF16.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_channels.h"
#include "numbers.h"

namespace den_kernels {

// out[b, :, :, O] = conv(x[b, :, :, I], weight[O, I]) + bias[O] over the channels I and O that instance b selected, and
// 0 in the others; an empty I leaves the bias; with `relu` the ReLU of that. Maps are channels-last; zero padding.
template <class T>
struct ConvArguments {
  int64_t B, H, W, C;     // input map
  int64_t Ho, Wo, C_out;  // output map
  int64_t R, S;           // kernel
  int64_t stride[2], padding[2], dilation[2];
  Selections route;
  std::vector<int64_t> in_sizes;   // [G] channels of the groups, or empty: not elastic
  std::vector<int64_t> out_sizes;  // [G] as in_sizes
  const T* x;                      // [B, H, W, C]
  T* out;                          // [B, Ho, Wo, C_out]
  const T* weight;                 // packed; float32: by pack_weights, [ceil(C_out / 16), ceil(C / 16), R * S, 16, 16]
  const T* bias;                   // [C_out] or null
  int64_t pixel, row, instance;    // values of `out` from one to the next: it may be some pixels of a larger map
  bool relu = false;
  // The columns of a kernel row are channels of one tap, as the pixels that they read lie side by side: the weight is
  // packed as one [C_out, R, 1, S * C]. For few channels; dilation 1, no in_sizes, float32.
  bool joined = false;
  int64_t tap_columns() const { return joined ? 1 : S; }
  int64_t tap_channels() const { return joined ? S * C : C; }
  // `out` is the whole output map.
  void write_whole_map() { pixel = C_out, row = Wo * pixel, instance = Ho * row; }
};

// Needs AVX-512 or AVX2 (has_direct_float32) and a kernel of at most 49 taps.
void dynamic_conv(const ConvArguments<float>& arguments);

// dweight [C_out, R, S, C]: sum over the instances b that selected both channels, and over the pixels p, of
// grad[b, p, C_out] * x[b, p * stride + tap, C]; 0 where none did. grad is [B, Ho, Wo, C_out]; out of the arguments,
// weight and bias are not looked at. Needs what dynamic_conv needs.
void dynamic_conv_weight_gradient(const ConvArguments<float>& arguments, const float* grad, float* dweight);

// Takes bfloat16. Needs AMX and stride 1, or no AMX but AVX-512 BF16; dilation 1, C and C_out divisible by 16.
void dynamic_conv_weight_gradient(const ConvArguments<bf16>& arguments, const bf16* grad, bf16* dweight);

// Needs AMX or AVX-512 BF16 (has_direct_bf16), a kernel of at most 49 taps, dilation 1, C and C_out divisible
// by 16, and weights packed by pack_weights_bf16 for the prefixes of in_sizes. With AMX `out` has to be a whole map.
void dynamic_conv(const ConvArguments<bf16>& arguments);

}  // namespace den_kernels
