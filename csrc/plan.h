// The routing plan: for each of N blocks, the B instances sorted by how many of its G channel groups they use.
#pragma once

#include <cstdint>

namespace den_kernels {

// What a plan writes, one row per block. With levels segment s of a block holds its instances of level G - s (S = G +
// 1); with masks it holds the s-th distinct mask (S = B, trailing segments empty). Segment s is
// order[offsets[s]:offsets[s+1]].
struct Plan {
  int32_t* levels;   // [N, B] groups in use
  int32_t* order;    // [N, B] instances, level descending, stable
  int32_t* offsets;  // [N, S + 1]
};

// levels [B, N] int32 or int64. Returns the index b * N + n of the first level outside 0..G, or -1; then nothing
// counts.
template <class T>
int64_t plan_levels(const T* levels, int64_t B, int64_t N, int64_t G, Plan plan);

// masks [N, B, G] bytes 0 or 1. Within a level, masks in lexicographic order with set bits first, equal masks by
// instance.
void plan_masks(const uint8_t* masks, int64_t B, int64_t N, int64_t G, Plan plan);

}  // namespace den_kernels
