// Behind the last map of a network: its mean, and layers that are fully connected.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace den_kernels {

// features[c] = mean over the pixels of relu(x[:, c] * scale[c] + shift[c]), NaN kept. x: [pixels, C]; scale and shift:
// [C], or both null.
void features_of(const float* x, int64_t pixels, int64_t C, const float* scale, const float* shift, float* features);
void features_of(const bf16* x, int64_t pixels, int64_t C, const float* scale, const float* shift, bf16* features);

// A fully connected layer behind an affine map of its inputs.
template <class T>
struct Head {
  int64_t C, O;
  const float *scale, *shift;  // [C], or both null
  const T* weight;             // [O, C]
  const T* bias;               // [O]
};

// logits[b] = weight (features[b] * scale + shift) + bias. features: [B, C], logits: [B, O].
void run_head(const Head<float>& head, const float* features, int64_t B, float* logits);
void run_head(const Head<bf16>& head, const bf16* features, int64_t B, bf16* logits);

}  // namespace den_kernels
