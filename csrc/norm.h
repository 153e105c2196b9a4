// Batch norm whose channels take their statistics only from the instances that use them.
#pragma once

#include <cstdint>
#include <vector>

namespace den_kernels {

// A channels-last batch and the channel groups that each of its instances uses. What lies outside them has no effect.
struct NormBatch {
  int64_t B, P, C;            // instances, positions of a map, channels
  int64_t fold;               // divides P: so many positions are treated as one row of fold * C lanes
  int64_t element_bytes;      // 4: float32, 2: bfloat16
  const uint8_t* selection;   // [B, G] 0 or 1
  std::vector<int64_t> ends;  // [G] first channel after each group; the last one is C
};

// The affine map of a training or inference step: y = (x - mean) * weight / sqrt(var + eps) + bias, then ReLU.
struct NormAffine {
  const float* statistics;  // [3, C] mean, biased variance, number of values
  const float* weight;      // [C], null: ones
  const float* bias;        // [C], null: zeros
  float eps;
  bool relu;
};

// statistics [3, C] of x [B, P, C] over the instances that use a channel; (0, 0, 0) where none does.
void norm_statistics(const NormBatch& batch, const void* x, float* statistics);

// y [B, P, C]: normalised where used, 0 elsewhere.
void norm_apply(const NormBatch& batch, const NormAffine& affine, const void* x, void* y);

// sums [2, C] over the using instances: g and g * (x - mean) / sqrt(var + eps), where g is dy behind the ReLU.
void norm_reduce(const NormBatch& batch, const NormAffine& affine, const void* dy, const void* x, float* sums);

// dx [B, P, C]: 0 where not used. `sums` of norm_reduce carry the gradient through the statistics; null: constants.
void norm_gradient(const NormBatch& batch, const NormAffine& affine, const void* dy, const void* x, const float* sums,
                   void* dx);

}  // namespace den_kernels
