// An inverted residual block at inference on a CPU, over the hidden channels that each instance selected: float32 with
// AVX-512 or AVX2.
#pragma once

#include <cstdint>
#include <vector>

#include "activation.h"
#include "direct_channels.h"

namespace den_kernels {

// out[b] = shortcut[b] + conv3(gate * h) + bias3 over the hidden channels that instance b selected, shortcut[b] where
// it selected none, with
//   h    = activation(conv2(activation(conv1(x[b]) + bias1)) + bias2)     conv1 null: conv2 reads x[b]
//   gate = gate_activation(excite * squeeze_activation(squeeze * mean(h) + squeeze_bias) + excite_bias)     Q = 0: 1
// conv1 and conv3 are 1 x 1, conv2 is a depthwise R x S with "same" padding and the stride; conv2 null: there is none,
// h = activation(conv1(x[b]) + bias1). Maps are channels-last; `out` may be `shortcut`, then an instance without a
// branch is not touched; both may be `x`.
struct InvertedResidual {
  int64_t B, H, W, C;       // input map
  int64_t Ho, Wo, C_out;    // output map: Ho = ceil(H / stride)
  int64_t M, R, S, stride;  // hidden channels, kernel and stride of conv2
  int64_t Q;                // channels of squeeze and excitation, or 0
  Selections route;
  std::vector<int64_t> sizes;  // [G] channels of the hidden groups
  const float* x;              // [B, H, W, C]
  const float* shortcut;       // [B, Ho, Wo, C_out] or null: 0
  float* out;                  // [B, Ho, Wo, C_out]
  const float* conv1;          // [M, C] by pack_weights, or null: then M = C
  const float* bias1;          // [M]
  const float* conv2;          // [ceil(M / 16), R * S, 16], or null: then R = S = stride = 1 and Q = 0
  const float* bias2;          // [M]
  const float* conv3;          // [C_out, M] by pack_weights
  const float* bias3;          // [C_out] or null
  const float* squeeze;        // [Q, M] by pack_weights
  const float* squeeze_bias;   // [Q]
  const float* excite;         // [M, Q] by pack_weights
  const float* excite_bias;    // [M]
  Activation activation, squeeze_activation, gate_activation;
};

// Needs AVX-512 or AVX2 (has_direct_float32); R and S odd, at most 7 x 7.
void dynamic_inverted_residual(const InvertedResidual& arguments);

}  // namespace den_kernels
