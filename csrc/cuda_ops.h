// The CUDA kernels that stand beside Triton: the routing plan in one launch, the fused residual block.
#pragma once

#include <cstdint>

#include "plan.h"

namespace den_kernels {

constexpr int64_t kPlanGroups = 255;     // channel groups that plan_levels_cuda takes
constexpr int64_t kPlanMaskGroups = 32;  // and plan_masks_cuda: a mask is one word

// plan_levels of plan.h in one launch: levels [B, N], strides in elements; a level outside 0..G is clamped.
template <class T>
void plan_levels_cuda(const T* levels, int64_t stride_b, int64_t stride_n, int64_t B, int64_t N, int64_t G, Plan plan,
                      void* stream);

// plan_masks of plan.h in one launch: masks [N, B, G] bytes 0 or 1.
void plan_masks_cuda(const uint8_t* masks, int64_t B, int64_t N, int64_t G, Plan plan, void* stream);

const void* plan_kernel_cuda();  // the kernel of plan_levels_cuda, for questions to the CUDA runtime

constexpr int kFusedGroups = 32;  // channel groups that fused_residual_cuda takes

// The layout of the work of fused_residual_cuda on the chip, chosen by den_kernels/_cuda_layout.py.
struct FusedLayout {
  int instances;       // T: whole maps that a thread block takes at a time; 1 with bands
  int rows;            // output rows of a band; Ho for whole maps
  int columns;         // of the 8 warps those that share the output channels; 8 / columns share the pixels
  int hidden_columns;  // of the 8 warps those that share a slice of hidden channels, 16 channels each
  int taps1, bytes1;   // a step of conv1's weights: taps, and bytes of each tap's row
  int taps2, bytes2;   // a step of conv2's weights
  int blocks;          // thread blocks
};

// out[b] = shortcut(x[b]) + branch(x[b]), in one launch, for a route made from levels.
//   a = relu(x * scale1 + shift1)                                           (scale1 null: a = x)
//   h = relu(conv(a, conv1[:width], stride) * scale2[:width] + bias1[:width])
//   branch = conv(h, conv2[:, :width]) + bias2                              (bias2 null: 0)
// With `relu` a post-activation block: its first norm is scale2 and bias1, its second one stands in conv2 and bias2.
// 3 x 3, zero padding 1, channels-last maps and weights. C, C_out and all widths are multiples of 16.
struct FusedResidual {
  int B, H, W, C, Ho, Wo, C_out, M, stride, G;
  const void* x;                 // [B, H, W, C]
  void* out;                     // [B, Ho, Wo, C_out]
  const int32_t* order;          // [B] sorted by level, descending
  const int32_t* offsets;        // [G + 2] segment s holds level G - s
  const float* scale1;           // [C] or null
  const float* shift1;           // [C]
  const void* conv1;             // [M, 3, 3, C]
  const float* scale2;           // [M]
  const float* bias1;            // [M]
  const void* conv2;             // [C_out, 3, 3, M]
  const float* bias2;            // [C_out] or null
  bool holds_shortcut;           // out holds the shortcut (it may be x): instances at level 0 are not touched
  bool relu;                     // of the sum
  int widths[kFusedGroups + 1];  // hidden channels of levels 0..G
  FusedLayout layout;
};

enum class FusedType { bfloat16, float16, tf32 };  // tf32: float32 in memory

int64_t fused_residual_shared(const FusedResidual& block, FusedType type);  // bytes of shared memory
void fused_residual_cuda(const FusedResidual& block, FusedType type, void* stream);

}  // namespace den_kernels
