// Weights as the AMX kernels read them: steps of up to 32 inputs x 16 output channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace den_kernels {

// True for fewer channels than a step of inputs holds: then the S pixels under a row of the kernel are one run of
// inputs.
inline bool is_narrow(int64_t width) { return width < 32; }

// The steps into which such a run is cut: `steps` steps of `pairs` pairs of inputs. A pixel takes `unit` inputs: its
// channels, then zeros. The last step ends with the run: pixels beyond it may hold NaN, which a zero weight would not
// make zero.
struct Cutting {
  int64_t unit, steps, pairs;
};

// The cutting with the fewest steps, and among those the fewest zeros.
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
