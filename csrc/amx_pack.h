// Weights as the AMX kernels read them: steps of up to 32 inputs x 16 output channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace den_kernels {

// Fewer channels than a step of inputs holds: the S pixels under a row of the kernel are one run of inputs.
inline bool is_narrow(int64_t width) { return width < 32; }

// How such a run is cut: `steps` steps of `pairs` pairs of inputs, of pixels that are `unit` channels apart, `width` of
// them and zeros. Steps end where the run ends: beyond lie pixels outside the window, and a zero weight does not
// silence a NaN.
struct Cutting {
  int64_t unit, steps, pairs;
};

// The fewest steps, and then the fewest zeros.
inline Cutting cutting_of(int64_t width, int64_t S) {
  Cutting best{32, S, 16};
  const int64_t least = (S * width + 31) / 32;
  for (int64_t unit = std::max<int64_t>(2, (width + 1) / 2 * 2); unit < 32 && best.steps > least; unit += 2) {
    const int64_t pairs = S * unit / 2;
    int64_t steps = (pairs + 15) / 16;
    while (pairs % steps) ++steps;
    if (steps < best.steps) best = {unit, steps, pairs / steps};
  }
  return best;
}

// Steps that a convolution over `width` channels takes.
inline int64_t steps_of(int64_t width, int64_t R, int64_t S) {
  return is_narrow(width) ? R * cutting_of(width, S).steps : (width + 31) / 32 * R * S;
}

// The weights over `width` input channels in a packing, the steps from one tile of outputs to the next, and whether all
// weights of the packing are finite.
struct Section {
  const bf16* weights;
  int64_t steps;
  bool finite;
};

// widths: [G + 1], of the levels; width: one of them.
Section section_of(const bf16* packed, const std::vector<int64_t>& widths, int64_t width, int64_t O, int64_t R,
                   int64_t S);

// weight [O, R, S, I], times scale [O] unless that is null, with I = widths[G] -> [narrow levels, then all wide ones]
// [ceil(O / 16)][step][16][16][2] in `amx_packed_size` values: a wide level reads the first steps of the widest, a
// narrow one's steps are its own. The last value is 0 where all others are finite.
void amx_pack_weights(const bf16* weight, const float* scale, bf16* packed, int64_t O, int64_t R, int64_t S,
                      const std::vector<int64_t>& widths);
int64_t amx_packed_size(int64_t O, int64_t R, int64_t S, const std::vector<int64_t>& widths);

}  // namespace den_kernels
