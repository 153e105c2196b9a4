// Convolutions with cardinality groups of fewer than 16 channels, a power of two: a vector of outputs holds several of
// these, and reads the vector of inputs at the same place, whose lanes are put in order instead of broadcast.
#pragma once

#include <cstdint>

#include "direct_sums.h"

namespace den_kernels {
namespace {

// Whether sum_groups takes cardinality groups of `unit` channels; else they must be divisible by 16.
constexpr bool narrow_groups(int64_t unit) { return unit < 16 && 16 % unit == 0; }

#pragma GCC push_options
DEN_KERNELS_TARGET

// The sums of a tile of 16 outputs, each pixel's to finish(strip, pixel, sums). in.at: the first of the 16 inputs;
// in.pieces are not looked at. No sum has more than 8 products a tap.
template <class Finish>
struct GroupTile {
  static constexpr int vectors = 1;
  static constexpr int most(int, int size) { return strips_per_tile(size, 1); }
  template <int, int strips, int size>
  static void run(const Inputs& in, int64_t unit, const Vector& bias, const Finish& finish) {
    Vector acc[strips * size][1];
    set_zero(acc);
    for (int64_t k = 0; k < unit; ++k) {
      const Order order = lane_of_group(unit, k);
      for (int64_t t = in.taps.begin; t < in.taps.end; ++t) {
        const Vector weights = load16(in.weight + t * 256 + k * 16);
        UNROLL for (int q = 0; q < strips; ++q) {
          const float* from = in.at[q] + in.taps.at[t];
          UNROLL for (int i = 0; i < size; ++i) {
            Vector& sum = acc[q * size + i][0];
            sum = fma(load_ordered(from + i * in.pixel, order), weights, sum);
          }
        }
      }
    }
    add_bias(acc, {bias});
    const Finish own = finish;
    UNROLL for (int q = 0; q < strips; ++q) { UNROLL for (int i = 0; i < size; ++i) own(q, i, acc[q * size + i]); }
  }
};

template <class Finish>
void sum_groups(int64_t size, int64_t strips, int64_t unit, const Inputs& in, const Vector& bias,
                const Finish& finish) {
  tile_of<GroupTile<Finish>>(size, 1, strips)(in, unit, bias, finish);
}

#pragma GCC pop_options

}  // namespace
}  // namespace den_kernels
