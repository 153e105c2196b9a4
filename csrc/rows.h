// Rows of instances, moved between a batch and the packed batch of one segment of a route.
#pragma once

#include <cstdint>

namespace den_kernels {

// Codes of the element types that the row kernels take; the same in Python (den_kernels/rows.py).
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// dst[j, p, 0:width] = act(src[order[j], p, 0:width] * scale + shift)    src [B, P, src_stride], dst [n, P, width]
// scale and shift are both null (no affine) or both float32 [width]; act is ReLU or the identity.
void gather_rows(const void* src, void* dst, const int32_t* order, int64_t n, int64_t P, int64_t src_stride,
                 int64_t width, Dtype src_dtype, Dtype dst_dtype, const float* scale, const float* shift, bool relu);

// dst[order[j], p, 0:width] = or += src[j, p, 0:width]                    src [n, P, width], dst [B, P, dst_stride]
void scatter_rows(const void* src, void* dst, const int32_t* order, int64_t n, int64_t P, int64_t width,
                  int64_t dst_stride, Dtype src_dtype, Dtype dst_dtype, bool accumulate);

// dst[b] = shortcut(src[b]): mean over stride x stride windows (cut at the edge), channels C..C_out filled with zeros.
// src [B, H, W, C], dst [B, ceil(H / stride), ceil(W / stride), C_out]
void pool_rows(const void* src, void* dst, int64_t B, int64_t H, int64_t W, int64_t C, int64_t C_out, int64_t stride,
               Dtype dtype);

}  // namespace den_kernels
