// Inner loops of norm.cpp: one pass over consecutive channels of consecutive rows.
#pragma once

#include <cstdint>

namespace den_kernels {

// A lane is a channel of one of the `fold` positions that lie in one row. Maps of few channels are folded to long rows:
// loops over rows of a few channels would be all overhead.
constexpr int64_t folded_lanes = 64;

// Consecutive lanes of consecutive rows of one instance. Unfolded, all are used or all are not; folded, some are used.
struct Span {
  int64_t offset;  // elements of the batch before its first one
  int64_t rows, stride, width;
  int64_t lane, block;  // first lane; index of the block of rows that it lies in
};

// Coefficients of each lane of a span. keep: all bits set where the lane is used, else 0. floor: 0 applies ReLU, NaN
// disables it (no value compares as less than NaN).
struct Coefficients {
  const float *mean, *scale, *bias, *dmean, *dvar;
  const uint32_t* keep;
  float floor;
};

// The loops for one element type. x, dy, y and dx point to the whole batch.
struct SpanLoops {
  // mean[i], squares[i]: mean and sum of squared deviations over the rows of a lane.
  void (*moments)(const void* x, const Span& s, float* mean, float* squares);
  void (*apply)(const void* x, void* y, const Span& s, const Coefficients& k);
  // g[i], gx[i]: sums over the rows of g = dy behind the ReLU and of g * (x - mean).
  void (*reduce)(const void* dy, const void* x, const Span& s, const Coefficients& k, float* g, float* gx);
  void (*gradient)(const void* dy, const void* x, void* dx, const Span& s, const Coefficients& k);
};

SpanLoops span_loops(int64_t element_bytes);  // 4: float32, 2: bfloat16

}  // namespace den_kernels
