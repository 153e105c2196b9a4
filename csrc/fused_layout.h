// Shared memory of the fused residual block, and the checks of a layout.
#pragma once

#include <algorithm>

#include "check.h"
#include "cuda_ops.h"

namespace den_kernels {

constexpr int kFusedWarps = 8, kFusedStages = 3;
constexpr int kHiddenFragments = 4;  // a warp's most fragments of 16 hidden pixels
constexpr int kOutputFragments = 4;  // a warp's most fragments of 16 output pixels
constexpr int kOutputPairs = 4;      // a warp's most pairs of fragments, 16 output channels each
constexpr int kPad = 16;             // bytes behind each row: 8 rows in a column touch all banks

// Offsets and pitches in bytes.
struct FusedShared {
  int zero;                     // a row of zeros, for pixels outside the map
  int act, act_row;             // relu(bn1(x)): [instances, in_rows, W] rows of C
  int hidden, hidden_row;       // [instances, hidden_rows, Wo] rows of a slice
  int pixels;                   // where the pixels of a warp's fragments lie: for each thread a word of each
  int ring, stage, row1, row2;  // weights: stages of rows of taps x bytes
  int in_rows, slice, total;
};

inline FusedShared fused_shared(const FusedResidual& p, int element) {
  const FusedLayout& l = p.layout;
  FusedShared s;
  const int hidden_rows = std::min(p.Ho, l.rows + 2);
  s.in_rows = std::min(p.H, (hidden_rows - 1) * p.stride + 3);
  s.slice = 16 * l.hidden_columns;
  s.act_row = p.C * element + kPad;
  s.hidden_row = s.slice * element + kPad;
  s.row1 = l.taps1 * l.bytes1 + kPad;
  s.row2 = l.taps2 * l.bytes2 + kPad;
  s.stage = std::max(s.slice * s.row1, p.C_out * s.row2);
  s.zero = 0;
  s.act = std::max(s.act_row, s.hidden_row);
  s.hidden = s.act + l.instances * s.in_rows * p.W * s.act_row;
  s.pixels = s.hidden + l.instances * hidden_rows * p.Wo * s.hidden_row;
  s.ring = s.pixels + 32 * kFusedWarps * (kHiddenFragments + kOutputFragments) * 4;
  s.total = s.ring + kFusedStages * s.stage;
  return s;
}

inline void check_fused(const FusedResidual& p, int element) {
  const char* op = "fused_residual_cuda";
  const FusedLayout& l = p.layout;
  check(p.stride == 1 || p.stride == 2, op, "stride", "1 or 2", p.stride);
  check(p.C % 16 == 0 && p.C > 0, op, "C", "a multiple of 16", p.C);
  check(p.C_out % 16 == 0 && p.C_out >= p.C, op, "C_out", "a multiple of 16, at least C", p.C_out);
  check(p.G >= 1 && p.G <= kFusedGroups, op, "G", "in 1..32", p.G);
  for (int g = 0; g <= p.G; ++g) check(p.widths[g] % 16 == 0, op, "a width", "a multiple of 16", p.widths[g]);
  check(p.widths[p.G] <= p.M, op, "the last width", "at most M", p.widths[p.G]);
  check(p.x != p.out || p.holds_shortcut, op, "holds_shortcut", "true in place", p.holds_shortcut);
  check(l.rows >= 1 && (l.rows >= p.Ho || l.instances == 1), op, "instances", "1 with bands", l.instances);
  const int pixel_warps = kFusedWarps / l.columns, hidden_warps = kFusedWarps / l.hidden_columns;
  const int hidden = l.instances * std::min(p.Ho, l.rows + 2) * p.Wo;
  const int pixels = l.instances * std::min(p.Ho, l.rows) * p.Wo;
  check(pixel_warps * l.columns == kFusedWarps, op, "columns", "1, 2, 4 or 8", l.columns);
  check(hidden_warps * l.hidden_columns == kFusedWarps, op, "hidden_columns", "1, 2, 4 or 8", l.hidden_columns);
  check(p.C_out <= 16 * kOutputPairs * l.columns, op, "C_out", "at most 64 for each column of warps", p.C_out);
  check(pixels <= 16 * kOutputFragments * pixel_warps, op, "output pixels", "at most 64 for each row of warps", pixels);
  check(hidden <= 16 * kHiddenFragments * hidden_warps, op, "hidden pixels", "at most 64 for each row of warps",
        hidden);
  for (const int bytes : {l.bytes1, l.bytes2}) check(bytes > 0 && bytes % 32 == 0, op, "bytes", "32 times n", bytes);
  for (const int taps : {l.taps1, l.taps2}) check(taps > 0 && 9 % taps == 0, op, "taps", "1, 3 or 9", taps);
  check(l.taps1 == 1 || l.bytes1 >= p.C * element, op, "bytes1", "a whole row with several taps", l.bytes1);
  check(l.taps2 == 1 || l.bytes2 >= 16 * l.hidden_columns * element, op, "bytes2", "a whole row with several taps",
        l.bytes2);
  check(l.blocks >= 1, op, "blocks", "at least 1", l.blocks);
}

}  // namespace den_kernels
