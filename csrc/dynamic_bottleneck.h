// A bottleneck block at inference on a CPU, over the hidden channels that each instance selected; float32, AVX-512.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_channels.h"

namespace den_kernels {

// out[b] = shortcut[b] + conv3(relu(conv2(relu(conv1(relu(scale1 * x[b] + shift1)) + bias1)) + bias2)) over the hidden
// channels that instance b selected; an instance that selected none is not touched. conv1 and conv3 are 1 x 1, conv2 is
// R x S with "same" padding, the stride and the cardinality. Maps are channels-last.
struct BottleneckProblem {
  int64_t B, H, W, C, M, C_out;  // input map, hidden channels, output channels
  int64_t R, S, stride, cardinality;
  Selections route;
  std::vector<int64_t> sizes;  // [G] channels of the hidden groups
  const float* x;              // [B, H, W, C]
  float* out;                  // [B, Ho, Wo, C_out], holds the shortcut; may be x
  const float* scale1;         // [C], or null: no batch norm and no ReLU before conv1
  const float* shift1;         // [C]
  const float* conv1;          // packed by pack_weights, as conv2 [M, M / cardinality, R, S] and conv3
  const float* bias1;          // [M]
  const float* conv2;
  const float* bias2;  // [M]
  const float* conv3;
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }
};

// Needs AVX-512 (has_dynamic_residual); C, C_out and M / cardinality divisible by 16; R and S odd, at most 7 x 7; a
// selection keeps whole cardinality groups.
void dynamic_bottleneck(const BottleneckProblem& problem);

}  // namespace den_kernels
