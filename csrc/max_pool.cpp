#include "max_pool.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"

namespace den_kernels {
namespace {

// The largest of some pixels of C channels, `step` values from one row to the next.
template <class T>
ALWAYS_INLINE void largest(const T* __restrict x, int64_t rows, int64_t columns, int64_t step, int64_t C,
                           T* __restrict out) {
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < C; first += block) {
    const int64_t width = std::min(block, C - first);
    float most[block];
    for (int64_t c = 0; c < width; ++c) most[c] = -std::numeric_limits<float>::infinity();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; ++column) {
        const T* __restrict from = x + row * step + column * C + first;
        for (int64_t c = 0; c < width; ++c) {
          const float v = widen(from[c]);
          most[c] = v > most[c] || v != v ? v : most[c];
        }
      }
    for (int64_t c = 0; c < width; ++c) narrow(most[c], out[first + c]);
  }
}

template <class T>
ALWAYS_INLINE void pool_row(const T* x, T* out, int64_t H, int64_t W, int64_t C, int64_t top, const MaxPool& pool) {
  const int64_t first = std::max<int64_t>(top, 0), rows = std::min(top + pool.size, H) - first;
  for (int64_t i = 0, count = pool.out(W); i < count; ++i) {
    const int64_t left = i * pool.stride - pool.padding, begin = std::max<int64_t>(left, 0);
    largest(x + (first * W + begin) * C, rows, std::min(left + pool.size, W) - begin, W * C, C, out + i * C);
  }
}

}  // namespace

DEN_KERNELS_CLONES void max_pool_row(const float* x, float* out, int64_t H, int64_t W, int64_t C, int64_t top,
                                     const MaxPool& pool) {
  pool_row(x, out, H, W, C, top, pool);
}
DEN_KERNELS_CLONES void max_pool_row(const bf16* x, bf16* out, int64_t H, int64_t W, int64_t C, int64_t top,
                                     const MaxPool& pool) {
  pool_row(x, out, H, W, C, top, pool);
}

}  // namespace den_kernels
