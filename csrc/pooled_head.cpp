#include "pooled_head.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace den_kernels {
namespace {

template <class T>
ALWAYS_INLINE void pool_features(const T* __restrict x, int64_t pixels, int64_t C, const float* __restrict scale,
                                 const float* __restrict shift, T* __restrict features) {
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < C; first += block) {
    const int64_t width = std::min(block, C - first);
    float sums[block] = {};
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < width; ++c) {
        float v = widen(x[p * C + first + c]);
        if (scale) v = v * scale[first + c] + shift[first + c];
        sums[c] += v < 0.f ? 0.f : v;
      }
    for (int64_t c = 0; c < width; ++c) narrow(sums[c] / static_cast<float>(pixels), features[first + c]);
  }
}

// The product of a row of weights and an instance's features, in 16 sums side by side.
template <class T>
ALWAYS_INLINE float dot(const T* __restrict weight, const float* __restrict features, int64_t C) {
  constexpr int64_t lanes = 16;
  float sums[lanes] = {};
  int64_t c = 0;
  for (; c + lanes <= C; c += lanes)
    for (int64_t k = 0; k < lanes; ++k) sums[k] += widen(weight[c + k]) * features[c + k];
  for (int64_t k = 0; c + k < C; ++k) sums[k] += widen(weight[c + k]) * features[c + k];
  for (int64_t half = lanes / 2; half; half /= 2)
    for (int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

DEN_KERNELS_CLONES float product(const float* weight, const float* features, int64_t C) {
  return dot(weight, features, C);
}
DEN_KERNELS_CLONES float product(const bf16* weight, const float* features, int64_t C) {
  return dot(weight, features, C);
}

template <class T>
std::vector<float> inputs_of(const Head<T>& head, const T* features, int64_t B) {
  std::vector<float> inputs(static_cast<size_t>(B * head.C));
  for (int64_t b = 0; b < B; ++b)
    for (int64_t c = 0; c < head.C; ++c) {
      const float v = widen(features[b * head.C + c]);
      inputs[b * head.C + c] = head.scale ? v * head.scale[c] + head.shift[c] : v;
    }
  return inputs;
}

// An output's weights serve all instances while they are in the cache.
template <class T>
void run(const Head<T>& head, const T* features, int64_t B, T* logits) {
  const std::vector<float> inputs = inputs_of(head, features, B);
#pragma omp parallel for schedule(static) if (B * head.O * head.C > 1 << 20)
  for (int64_t o = 0; o < head.O; ++o)
    for (int64_t b = 0; b < B; ++b)
      narrow(product(head.weight + o * head.C, inputs.data() + b * head.C, head.C) + widen(head.bias[o]),
             logits[b * head.O + o]);
}

}  // namespace

DEN_KERNELS_CLONES void features_of(const float* x, int64_t pixels, int64_t C, const float* scale, const float* shift,
                                    float* features) {
  pool_features(x, pixels, C, scale, shift, features);
}
DEN_KERNELS_CLONES void features_of(const bf16* x, int64_t pixels, int64_t C, const float* scale, const float* shift,
                                    bf16* features) {
  pool_features(x, pixels, C, scale, shift, features);
}

void run_head(const Head<float>& head, const float* features, int64_t B, float* logits) {
  run(head, features, B, logits);
}
void run_head(const Head<bf16>& head, const bf16* features, int64_t B, bf16* logits) { run(head, features, B, logits); }

}  // namespace den_kernels
