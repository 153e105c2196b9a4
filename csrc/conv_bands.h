// The pieces of work of the direct convolutions: bands of output rows of one instance, or of a few instances where
// their maps are small, all independent of each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "direct_chunks.h"
#include "dynamic_conv.h"
#include "openmp.h"

namespace den_kernels {

// The channels that the instances of each segment read and write.
struct Sides {
  std::vector<Channels> inputs, outputs;  // [S]
};

// Output rows first_row .. first_row + rows of instances order[start : start + count], all of one selection.
struct Band {
  int64_t start, count, first_row, rows;
  const Channels &inputs, &outputs;
};

// The bands of a batch, heavy ones first. Small maps: a few instances together, so that the weights are read once;
// counts are below `multiple` or divisible by it. bytes_of(band): the scratch memory that a band takes.
template <class T, class Bytes>
std::vector<Band> make_bands(const ConvArguments<T>& p, const Sides& sides, int64_t threads, int64_t multiple,
                             Bytes bytes_of) {
  static const Channels nothing;
  std::vector<Band> bands;
  const int64_t room = scratch_bytes() / 2;
  int64_t rest = p.B;
  for (int64_t s = 0; s < p.route.S; ++s) {
    const int64_t last = p.route.offsets[s + 1];
    const Channels &outputs = sides.outputs[s], &inputs = outputs.count ? sides.inputs[s] : nothing;
    const Band whole{0, multiple, 0, p.Ho, inputs, outputs};
    const int64_t bytes = std::max<int64_t>(1, bytes_of(whole));
    const int64_t fits = std::max(room / bytes * multiple, multiple);
    // Halves of a map where there are fewer instances than threads can share, and bands that fit the scratch memory.
    const int64_t least = std::min(
        p.Ho, std::max((bytes + room - 1) / room, p.B < 2 * threads ? 2 * threads / std::max<int64_t>(p.B, 1) : 1));
    const int64_t rows = (p.Ho + least - 1) / std::max<int64_t>(least, 1);
    for (int64_t i = p.route.offsets[s]; i < last;) {
      const int64_t left = std::min({fits, round_up(fair_share(rest, threads), multiple), last - i});
      const int64_t count = left > multiple ? left / multiple * multiple : left;
      for (int64_t row = 0; row < p.Ho; row += rows)
        bands.push_back({i, count, row, std::min(rows, p.Ho - row), inputs, outputs});
      rest -= count;
      i += count;
    }
  }
  return bands;
}

// All bands shared out among the threads, or those of a team: work(band, scratch memory). block: the channels that the
// kernel takes at once.
template <class T, class Bytes, class Work>
void run_bands(const ConvArguments<T>& p, int64_t block, int64_t multiple, Bytes bytes_of, Work work) {
  check(p.R * p.S <= max_taps, "dynamic_conv", "kernel", "of at most 49 taps", p.R * p.S);
  Team* team = Team::current();
  const int64_t threads = team ? team->threads() : omp_get_max_threads();
  const Sides sides{channels_of(p.route, p.in_sizes, p.C, block), channels_of(p.route, p.out_sizes, p.C_out, block)};
  const std::vector<Band> bands = make_bands(p, sides, threads, multiple, bytes_of);
  const int64_t count = static_cast<int64_t>(bands.size());
  const auto run = [&](int64_t i) { work(bands[i], scratch_of_thread(std::max<int64_t>(bytes_of(bands[i]), 64))); };
  team ? team->run_parts(count, run) : share_out(count, threads, run);
}

}  // namespace den_kernels
