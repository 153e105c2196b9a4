#include "norm_spans.h"

#include <cstring>

#include "dispatch.h"
#include "numbers.h"

namespace den_kernels {
namespace {

constexpr int64_t tile_lanes = 64;

ALWAYS_INLINE float kept(float v, uint32_t keep) {  // v or 0, also where v is NaN
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  u &= keep;
  std::memcpy(&v, &u, sizeof u);
  return v;
}

ALWAYS_INLINE float affine_of(float x, float mean, float scale, float bias) { return (x - mean) * scale + bias; }

// One tile of lanes. The sums are taken about the mean of a sample of the rows: a large common offset does not cancel.
template <class T>
ALWAYS_INLINE void moments_tile(const T* __restrict x, int64_t rows, int64_t stride, int64_t width,
                                float* __restrict mean, float* __restrict squares) {
  const int64_t samples = rows < 4 ? rows : 4 + rows / 32;
  float centre[tile_lanes] = {}, sum[tile_lanes] = {}, square[tile_lanes] = {};
  for (int64_t i = 0; i < samples; ++i) {
    const T* __restrict row = x + i * rows / samples * stride;
    for (int64_t c = 0; c < width; ++c) centre[c] += widen(row[c]);
  }
  for (int64_t c = 0; c < width; ++c) centre[c] /= static_cast<float>(samples);
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = x + r * stride;
    for (int64_t c = 0; c < width; ++c) {
      const float d = widen(row[c]) - centre[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    const float shift = sum[c] / static_cast<float>(rows), rest = square[c] - sum[c] * shift;
    mean[c] = centre[c] + shift;
    squares[c] = rest < 0.f ? 0.f : rest;
  }
}

template <class T>
ALWAYS_INLINE void moments(const T* x, const Span& s, float* mean, float* squares) {
  for (int64_t c = 0; c < s.width; c += tile_lanes)
    moments_tile(x + c, s.rows, s.stride, s.width - c < tile_lanes ? s.width - c : tile_lanes, mean + c, squares + c);
}

template <class T>
ALWAYS_INLINE void apply(const T* x, T* y, const Span& s, const Coefficients& k) {
  const float* __restrict mean = k.mean;
  const float* __restrict scale = k.scale;
  const float* __restrict bias = k.bias;
  const uint32_t* __restrict keep = k.keep;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* __restrict in = x + r * s.stride;
    T* __restrict out = y + r * s.stride;
    for (int64_t c = 0; c < s.width; ++c) {
      const float v = affine_of(widen(in[c]), mean[c], scale[c], bias[c]);
      narrow(kept(v < k.floor ? k.floor : v, keep[c]), out[c]);
    }
  }
}

template <class T>
ALWAYS_INLINE void reduce(const T* dy, const T* x, const Span& s, const Coefficients& k, float* __restrict g,
                          float* __restrict gx) {
  const float* __restrict mean = k.mean;
  const float* __restrict scale = k.scale;
  const float* __restrict bias = k.bias;
  for (int64_t c = 0; c < s.width; ++c) g[c] = gx[c] = 0.f;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* __restrict in = x + r * s.stride;
    const T* __restrict grad = dy + r * s.stride;
    for (int64_t c = 0; c < s.width; ++c) {
      const float v = widen(in[c]);
      const float d = affine_of(v, mean[c], scale[c], bias[c]) <= k.floor ? 0.f : widen(grad[c]);
      g[c] += d;
      gx[c] += d * (v - mean[c]);
    }
  }
}

template <class T>
ALWAYS_INLINE void gradient(const T* dy, const T* x, T* dx, const Span& s, const Coefficients& k) {
  const float* __restrict mean = k.mean;
  const float* __restrict scale = k.scale;
  const float* __restrict bias = k.bias;
  const float* __restrict dmean = k.dmean;
  const float* __restrict dvar = k.dvar;
  const uint32_t* __restrict keep = k.keep;
  for (int64_t r = 0; r < s.rows; ++r) {
    const T* __restrict in = x + r * s.stride;
    const T* __restrict grad = dy + r * s.stride;
    T* __restrict out = dx + r * s.stride;
    for (int64_t c = 0; c < s.width; ++c) {
      const float v = widen(in[c]);
      const float d = affine_of(v, mean[c], scale[c], bias[c]) <= k.floor ? 0.f : widen(grad[c]);
      narrow(kept(d * scale[c] - dmean[c] - (v - mean[c]) * dvar[c], keep[c]), out[c]);
    }
  }
}

// target_clones does not reach templates, so each type gets a plain function around the inlined body.
#define DEFINE_SPANS(NAME, T)                                                                                          \
  DEN_KERNELS_CLONES void moments_##NAME(const void* x, const Span& s, float* mean, float* squares) {                  \
    moments(static_cast<const T*>(x) + s.offset, s, mean, squares);                                                    \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void apply_##NAME(const void* x, void* y, const Span& s, const Coefficients& k) {                 \
    apply(static_cast<const T*>(x) + s.offset, static_cast<T*>(y) + s.offset, s, k);                                   \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void reduce_##NAME(const void* dy, const void* x, const Span& s, const Coefficients& k, float* g, \
                                        float* gx) {                                                                   \
    reduce(static_cast<const T*>(dy) + s.offset, static_cast<const T*>(x) + s.offset, s, k, g, gx);                    \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void gradient_##NAME(const void* dy, const void* x, void* dx, const Span& s,                      \
                                          const Coefficients& k) {                                                     \
    gradient(static_cast<const T*>(dy) + s.offset, static_cast<const T*>(x) + s.offset,                                \
             static_cast<T*>(dx) + s.offset, s, k);                                                                    \
  }

DEFINE_SPANS(f32, float)
DEFINE_SPANS(b16, bf16)

}  // namespace

SpanLoops span_loops(int64_t element_bytes) {
  return element_bytes == 4 ? SpanLoops{moments_f32, apply_f32, reduce_f32, gradient_f32}
                            : SpanLoops{moments_b16, apply_b16, reduce_b16, gradient_b16};
}

}  // namespace den_kernels
