// The residual block at inference on a CPU, one pass over an instance, its hidden map in the cache: float32 with
// AVX-512 or AVX2, bfloat16 with AMX or AVX-512 BF16.
#pragma once

#include <cstdint>
#include <vector>

#include "direct_channels.h"
#include "numbers.h"

namespace den_kernels {

// out[b] = shortcut[b] + branch(x[b]) for every instance b, the branch over the hidden channels S that it selected:
//   a = relu(x * scale1 + shift1)      (scale1 null: a = x)
//   h = relu(conv(a, conv1[S], stride) + bias1[S])
//   branch = conv(h, conv2[:, S]) + bias2, 0 where S is empty
// and with `relu` the ReLU of the sum. `out` may be `shortcut`, then an instance without a branch is not touched;
// `shortcut` may be `x`.
// Maps are channels-last, kernels R x S odd with "same" zero padding; weights come from pack_weights
// or pack_weights_bf16 (dynamic_bf16.h), or are the parameters (scale2, unpacked2).
template <class T>
struct ResidualBlock {
  int64_t B, H, W, C;       // input map
  int64_t Ho, Wo, C_out;    // output map: Ho = ceil(H / stride)
  int64_t M, R, S, stride;  // hidden channels, kernel, stride of conv1
  Selections route;
  std::vector<int64_t> sizes;  // [G] hidden channels of the groups
  const T* x;                  // [B, H, W, C]
  const T* shortcut;           // [B, Ho, Wo, C_out]
  T* out;                      // [B, Ho, Wo, C_out]
  const float* scale1;         // [C] or null
  const float* shift1;         // [C] or null
  const T* conv1;              // packed; float32: [ceil(M / 16), ceil(C / 16), R * S, 16, 16]
  const float* bias1;          // [M]
  const T* conv2;              // packed; float32: [C_out / 16, ceil(M / 16), R * S, 16, 16]
  const float* bias2;          // [C_out] or null
  const float* scale2;         // [M]: conv1 is the parameter [M, R, S, C], to be multiplied by it; null: packed
  bool unpacked2;              // conv2 is the parameter [C_out, R, S, M]
  bool relu;                   // of the sum
};

// C and C_out must be divisible by 16.
void dynamic_residual(const ResidualBlock<float>& block);
void dynamic_residual(const ResidualBlock<bf16>& block);  // with AMX takes packed weights only, else of an even M
bool has_direct_float32();                                // true where this CPU runs the float32 block
bool has_direct_bf16();                                   // true where it runs the bfloat16 block

// weight [O, taps, I], times scale [O] unless that is null -> [ceil(O / 16), ceil(I / 16), taps, 16 of I, 16 of O],
// zeros beyond O and I. A prefix of I is a prefix of each of its blocks of O, so one packing serves all levels.
void pack_weights(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I);

// pack_weights for the transposed convolution, inputs and outputs swapped and the last tap first: [ceil(I / 16),
// ceil(O / 16), taps, 16 of O, 16 of I].
void pack_turned_weights(const float* weight, float* packed, int64_t O, int64_t taps, int64_t I);

}  // namespace den_kernels
