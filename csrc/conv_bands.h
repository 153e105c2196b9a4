// How the direct convolutions cut their work: bands of output rows of one instance, or of a few instances where their
// maps are small, all independent of each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "check.h"
#include "direct_chunks.h"
#include "dynamic_conv.h"

namespace den_kernels {

// Output rows first_row .. first_row + rows of instances order[start : start + count], all of one level.
struct Band {
  int64_t start, count, inputs, outputs, first_row, rows;
};

// The bands of a batch, heavy levels first. Small maps: a few instances together, so that the weights are read once;
// counts are below `multiple` or divisible by it. bytes_of(band): the scratch memory that a band takes.
template <class T, class Bytes>
std::vector<Band> make_bands(const ConvProblem<T>& p, int64_t threads, int64_t multiple, Bytes bytes_of) {
  std::vector<Band> bands;
  constexpr int64_t room = scratch_bytes / 2;
  const int64_t fair = round_up(std::max<int64_t>(1, p.B / (12 * threads)), multiple);
  for (int64_t s = 0; s <= p.G; ++s) {
    const int64_t level = p.G - s, last = p.offsets[s + 1];
    Band whole{0, multiple, p.in_widths[level], p.out_widths[level], 0, p.Ho};
    if (!whole.outputs) whole.inputs = 0;
    const int64_t bytes = std::max<int64_t>(1, bytes_of(whole));
    const int64_t together = std::clamp(room / bytes * multiple, multiple, fair);
    // Halves of a map where there are fewer instances than threads can share, and bands that fit the scratch memory.
    const int64_t least = std::min(
        p.Ho, std::max((bytes + room - 1) / room, p.B < 2 * threads ? 2 * threads / std::max<int64_t>(p.B, 1) : 1));
    const int64_t rows = (p.Ho + least - 1) / std::max<int64_t>(least, 1);
    for (int64_t i = p.offsets[s]; i < last;) {
      const int64_t left = std::min(together, last - i), count = left > multiple ? left / multiple * multiple : left;
      for (int64_t row = 0; row < p.Ho; row += rows)
        bands.push_back({i, count, whole.inputs, whole.outputs, row, std::min(rows, p.Ho - row)});
      i += count;
    }
  }
  return bands;
}

// All bands shared out among the threads: run(band, scratch memory).
template <class T, class Bytes, class Run>
void run_bands(const ConvProblem<T>& p, int64_t multiple, Bytes bytes_of, Run run) {
  check(p.R * p.S <= max_taps, "dynamic_conv", "kernel", "of at most 49 taps", p.R * p.S);
  const int64_t threads = omp_get_max_threads();
  const std::vector<Band> bands = make_bands(p, threads, multiple, bytes_of);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < static_cast<int64_t>(bands.size()); ++i)
    run(bands[i], scratch_of_thread(std::max<int64_t>(bytes_of(bands[i]), 64)));
}

}  // namespace den_kernels
