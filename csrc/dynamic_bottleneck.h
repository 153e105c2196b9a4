// A bottleneck block at inference on a CPU, over the hidden channels that each instance selected: float32 with AVX-512
// or AVX2, bfloat16 with AMX.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_channels.h"
#include "numbers.h"

namespace den_kernels {

// out[b] = shortcut[b] + conv3(relu(conv2(relu(conv1(relu(scale1 * x[b] + shift1)) + bias1)) + bias2)) + bias3 over the
// hidden channels that instance b selected, shortcut[b] where it selected none; with `relu` the ReLU of it. conv1 and
// conv3 are 1 x 1, conv2 is R x S with "same" padding, the stride and the cardinality. Maps are channels-last; `out`
// may be `shortcut`, then an instance without a branch is not touched; `shortcut` may be `x`.
template <class T>
struct BottleneckArguments {
  int64_t B, H, W, C;       // input map
  int64_t Ho, Wo, C_out;    // output map: Ho = ceil(H / stride)
  int64_t M, R, S, stride;  // hidden channels, kernel and stride of conv2
  int64_t cardinality;      // groups of conv2
  Selections route;
  std::vector<int64_t> sizes;  // [G] channels of the hidden groups
  const T* x;                  // [B, H, W, C]
  const T* shortcut;           // [B, Ho, Wo, C_out]
  T* out;                      // [B, Ho, Wo, C_out]
  const float* scale1;         // [C], or null: no batch norm and no ReLU before conv1
  const float* shift1;         // [C]
  const T* conv1;              // packed, as conv2 [M, M / cardinality, R, S] and conv3; float32: by pack_weights
  const float* bias1;          // [M]
  const T* conv2;
  const float* bias2;  // [M]
  const T* conv3;
  const float* bias3;  // [C_out] or null
  bool relu;           // of the sum
};

// Needs AVX-512 or AVX2 (has_direct_float32); C, C_out and M / cardinality divisible by 16, or this a divisor of 16 and
// all sizes divisible by 16; R and S odd, at most 7 x 7; a selection keeps whole cardinality groups.
void dynamic_bottleneck(const BottleneckArguments<float>& arguments);

// Needs AMX (has_amx); no cardinality; C divisible by 32, M and C_out by 16; weights packed by pack_weights_bf16, those
// of conv2 and conv3 for the prefixes of sizes.
void dynamic_bottleneck(const BottleneckArguments<bf16>& arguments);

}  // namespace den_kernels
