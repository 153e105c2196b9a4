// Max pooling of channels-last maps.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace den_kernels {

// The largest values of windows `stride` pixels apart, of a map with `padding` pixels of none around it; of size 0 the
// map itself.
struct MaxPool {
  int64_t size, stride, padding;
  // Side of the output; 0 where the padded map is smaller than a window.
  int64_t out(int64_t side) const {
    if (!size) return side;
    return side + 2 * padding < size ? 0 : (side + 2 * padding - size) / stride + 1;
  }
};

// One row of the output: out [pool.out(W), C] of windows over rows top .. top + size - 1 of x [H, W, C], of which some
// may lie outside, at most `padding` of them. A NaN is the largest.
void max_pool_row(const float* x, float* out, int64_t H, int64_t W, int64_t C, int64_t top, const MaxPool& pool);
void max_pool_row(const bf16* x, bf16* out, int64_t H, int64_t W, int64_t C, int64_t top, const MaxPool& pool);

}  // namespace den_kernels
