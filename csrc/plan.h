// The routing plan: for each of N blocks, the B instances sorted by how many of its G channel groups they use.
#pragma once

#include <cstdint>

namespace den_kernels {

// The outputs of a plan, one row per block. Segment s of a block is order[offsets[s]:offsets[s+1]]. In a plan of levels
// (S = G + 1) it holds the instances of level G - s; in one of masks (S = B, the last segments empty) those of the s-th
// distinct mask.
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
