#include "rows.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "numbers.h"

namespace den_kernels {
namespace {

// ReLU that lets NaN through, as torch.relu does.
ALWAYS_INLINE float relu_of(float v) { return v < 0.f ? 0.f : v; }

// One run of pixels: dst[p, c] = act(src[p, c] * scale[c] + shift[c]).
template <class Src, class Dst, bool affine, bool relu>
ALWAYS_INLINE void gather_pixels(const Src* src, Dst* dst, int64_t pixels, int64_t src_stride, int64_t width,
                                 const float* __restrict scale, const float* __restrict shift) {
  for (int64_t p = 0; p < pixels; ++p) {
    const Src* __restrict s = src + p * src_stride;
    Dst* __restrict d = dst + p * width;
    for (int64_t c = 0; c < width; ++c) {
      float v = widen(s[c]);
      if (affine) v = v * scale[c] + shift[c];
      if (relu) v = relu_of(v);
      narrow(v, d[c]);
    }
  }
}

// One run of pixels: dst[p, c] = or += src[p, c].
template <class Src, class Dst, bool accumulate>
ALWAYS_INLINE void scatter_pixels(const Src* src, Dst* dst, int64_t pixels, int64_t width, int64_t dst_stride) {
  for (int64_t p = 0; p < pixels; ++p) {
    const Src* __restrict s = src + p * width;
    Dst* __restrict d = dst + p * dst_stride;
    for (int64_t c = 0; c < width; ++c) narrow(accumulate ? widen(d[c]) + widen(s[c]) : widen(s[c]), d[c]);
  }
}

// One output pixel of the shortcut: the mean over its window. The windows that occur in numbers have loops of their
// own, over channels alone.
template <class T>
ALWAYS_INLINE void pool_pixel(const T* __restrict src, T* __restrict dst, int64_t rows, int64_t columns, int64_t W,
                              int64_t C, int64_t C_out) {
  const T* __restrict below = src + W * C;
  if (rows == 1 && columns == 1) {
    for (int64_t c = 0; c < C; ++c) dst[c] = src[c];
  } else if (rows == 2 && columns == 2) {
    for (int64_t c = 0; c < C; ++c)
      narrow((widen(src[c]) + widen(src[C + c]) + widen(below[c]) + widen(below[C + c])) * 0.25f, dst[c]);
  } else {
    const float share = 1.f / static_cast<float>(rows * columns);
    for (int64_t c = 0; c < C; ++c) {
      float sum = 0.f;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) sum += widen(src[(i * W + j) * C + c]);
      narrow(sum * share, dst[c]);
    }
  }
  for (int64_t c = C; c < C_out; ++c) narrow(0.f, dst[c]);
}

// target_clones does not reach templates, so each pair of types gets a plain function around the inlined body.
#define DEFINE_ROWS(NAME, SRC, DST)                                                                                    \
  DEN_KERNELS_CLONES void gather_##NAME(const void* src, void* dst, int64_t pixels, int64_t src_stride, int64_t width, \
                                        const float* scale, const float* shift, bool relu) {                           \
    auto s = static_cast<const SRC*>(src);                                                                             \
    auto d = static_cast<DST*>(dst);                                                                                   \
    if (scale && relu) return gather_pixels<SRC, DST, true, true>(s, d, pixels, src_stride, width, scale, shift);      \
    if (scale) return gather_pixels<SRC, DST, true, false>(s, d, pixels, src_stride, width, scale, shift);             \
    if (relu) return gather_pixels<SRC, DST, false, true>(s, d, pixels, src_stride, width, scale, shift);              \
    gather_pixels<SRC, DST, false, false>(s, d, pixels, src_stride, width, scale, shift);                              \
  }                                                                                                                    \
  DEN_KERNELS_CLONES void scatter_##NAME(const void* src, void* dst, int64_t pixels, int64_t width,                    \
                                         int64_t dst_stride, bool accumulate) {                                        \
    auto s = static_cast<const SRC*>(src);                                                                             \
    auto d = static_cast<DST*>(dst);                                                                                   \
    if (accumulate) return scatter_pixels<SRC, DST, true>(s, d, pixels, width, dst_stride);                            \
    scatter_pixels<SRC, DST, false>(s, d, pixels, width, dst_stride);                                                  \
  }

#define DEFINE_POOL(NAME, T)                                                                                           \
  DEN_KERNELS_CLONES void pool_##NAME(const void* src, void* dst, int64_t rows, int64_t columns, int64_t W, int64_t C, \
                                      int64_t C_out) {                                                                 \
    pool_pixel(static_cast<const T*>(src), static_cast<T*>(dst), rows, columns, W, C, C_out);                          \
  }

DEFINE_ROWS(f32_f32, float, float)
DEFINE_ROWS(b16_b16, bf16, bf16)
DEFINE_ROWS(h16_h16, fp16, fp16)
DEFINE_ROWS(h16_f32, fp16, float)
DEFINE_ROWS(f32_h16, float, fp16)
DEFINE_POOL(f32, float)
DEFINE_POOL(b16, bf16)
DEFINE_POOL(h16, fp16)

using GatherFn = void (*)(const void*, void*, int64_t, int64_t, int64_t, const float*, const float*, bool);
using ScatterFn = void (*)(const void*, void*, int64_t, int64_t, int64_t, bool);
struct RowFns {
  GatherFn gather;
  ScatterFn scatter;
};

RowFns row_fns(Dtype src, Dtype dst, const char* op) {
  if (src == dst) {
    if (src == Dtype::float32) return {gather_f32_f32, scatter_f32_f32};
    if (src == Dtype::bfloat16) return {gather_b16_b16, scatter_b16_b16};
    if (src == Dtype::float16) return {gather_h16_h16, scatter_h16_h16};
  }
  if (src == Dtype::float16 && dst == Dtype::float32) return {gather_h16_f32, scatter_h16_f32};
  if (src == Dtype::float32 && dst == Dtype::float16) return {gather_f32_h16, scatter_f32_h16};
  throw std::invalid_argument(std::string(op) + ": dtypes must be equal, or float16 and float32, got codes " +
                              std::to_string(static_cast<int>(src)) + " and " + std::to_string(static_cast<int>(dst)));
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Pixels that one thread takes at a time: about 8 KB of channels, so that small batches still fill the threads.
int64_t pixels_per_chunk(int64_t P, int64_t width) {
  return std::min<int64_t>(P, std::max<int64_t>(1, 2048 / std::max<int64_t>(width, 1)));
}

// Dense rows of few channels are seen as rows of `folded` channels, so that the inner loop fills its vectors:
// 16 channels of 1,024 pixels are 64 channels of 256 pixels, with scale and shift repeated four times.
constexpr int64_t folded = 64;

bool can_fold(int64_t P, int64_t stride, int64_t width) {
  return stride == width && width < folded && folded % std::max<int64_t>(width, 1) == 0 && P * width % folded == 0;
}

// Below this many elements waking the other threads costs more than it saves.
[[maybe_unused]] constexpr int64_t serial_elements = 16384;

}  // namespace

void gather_rows(const void* src, void* dst, const int32_t* order, int64_t n, int64_t P, int64_t src_stride,
                 int64_t width, Dtype src_dtype, Dtype dst_dtype, const float* scale, const float* shift, bool relu) {
  const GatherFn run = row_fns(src_dtype, dst_dtype, "gather_rows").gather;
  float repeated[2][folded];
  if (can_fold(P, src_stride, width)) {
    for (int64_t c = 0; scale && c < folded; ++c) repeated[0][c] = scale[c % width], repeated[1][c] = shift[c % width];
    if (scale) scale = repeated[0], shift = repeated[1];
    P = P * width / folded, src_stride = width = folded;
  }
  const int64_t chunk = pixels_per_chunk(P, width), chunks = P ? (P + chunk - 1) / chunk : 0;
  const int64_t src_bytes = bytes_of(src_dtype), dst_bytes = bytes_of(dst_dtype);
#pragma omp parallel for schedule(static) if (n * P * width > serial_elements)
  for (int64_t i = 0; i < n * chunks; ++i) {
    const int64_t j = i / chunks, p = i % chunks * chunk;
    run(static_cast<const char*>(src) + (order[j] * P + p) * src_stride * src_bytes,
        static_cast<char*>(dst) + (j * P + p) * width * dst_bytes, std::min(chunk, P - p), src_stride, width, scale,
        shift, relu);
  }
}

void scatter_rows(const void* src, void* dst, const int32_t* order, int64_t n, int64_t P, int64_t width,
                  int64_t dst_stride, Dtype src_dtype, Dtype dst_dtype, bool accumulate) {
  const ScatterFn run = row_fns(src_dtype, dst_dtype, "scatter_rows").scatter;
  if (can_fold(P, dst_stride, width)) P = P * width / folded, dst_stride = width = folded;
  const int64_t chunk = pixels_per_chunk(P, width), chunks = P ? (P + chunk - 1) / chunk : 0;
  const int64_t src_bytes = bytes_of(src_dtype), dst_bytes = bytes_of(dst_dtype);
#pragma omp parallel for schedule(static) if (n * P * width > serial_elements)
  for (int64_t i = 0; i < n * chunks; ++i) {
    const int64_t j = i / chunks, p = i % chunks * chunk;
    run(static_cast<const char*>(src) + (j * P + p) * width * src_bytes,
        static_cast<char*>(dst) + (order[j] * P + p) * dst_stride * dst_bytes, std::min(chunk, P - p), width,
        dst_stride, accumulate);
  }
}

void pool_rows(const void* src, void* dst, int64_t B, int64_t H, int64_t W, int64_t C, int64_t C_out, int64_t stride,
               Dtype dtype) {
  const auto run = dtype == Dtype::float32 ? pool_f32 : dtype == Dtype::bfloat16 ? pool_b16 : pool_h16;
  const int64_t Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride, bytes = bytes_of(dtype);
#pragma omp parallel for schedule(static) if (B * H * W * C > serial_elements)
  for (int64_t i = 0; i < B * Ho; ++i) {
    const int64_t b = i / Ho, h = i % Ho * stride, rows = std::min(stride, H - h);
    for (int64_t j = 0; j < Wo; ++j) {
      const int64_t w = j * stride;
      run(static_cast<const char*>(src) + ((b * H + h) * W + w) * C * bytes,
          static_cast<char*>(dst) + (i * Wo + j) * C_out * bytes, rows, std::min(stride, W - w), W, C, C_out);
    }
  }
}

}  // namespace den_kernels
