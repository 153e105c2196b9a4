// Code that the weight gradients share: a thread adds the tiles of its bands (conv_bands.h) up in memory of its own,
// and the threads' sums are added in the threads' order, so that a number of threads gives the same sums every time.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_bands.h"
#include "direct_tiles.h"

namespace den_kernels {
namespace {

// The sums of a thread, float32 [ceil(C_out / 16)][tap][C rounded up to 32][16].
template <class T>
int64_t sum_inputs(const ConvArguments<T>& p) {
  return round_up(p.C, 32);
}
template <class T>
int64_t sums_size(const ConvArguments<T>& p) {
  return (p.C_out + 15) / 16 * p.R * p.S * sum_inputs(p) * 16;
}

#pragma GCC push_options
DEN_KERNELS_TARGET

// One tap of 16 outputs of dweight [C_out][tap][C]: the threads' sums, added and turned.
template <class T>
void finish(const ConvArguments<T>& p, const std::vector<const float*>& sums, int64_t block, int64_t tap, T* dweight) {
  const int64_t tap_count = p.R * p.S, outputs = std::min<int64_t>(16, p.C_out - block * 16);
  for (int64_t i = 0; i < p.C; i += 16) {
    const int64_t from = ((block * tap_count + tap) * sum_inputs(p) + i) * 16;
    Vector tile[16];
    UNROLL for (int k = 0; k < 16; ++k) tile[k] = load16(sums[0] + from + k * 16);
    for (size_t n = 1; n < sums.size(); ++n) {
      UNROLL for (int k = 0; k < 16; ++k) tile[k] = add(tile[k], load16(sums[n] + from + k * 16));
    }
    transpose16(tile);
    for (int64_t o = 0; o < outputs; ++o)
      store16(dweight + ((block * 16 + o) * tap_count + tap) * p.C + i, tile[o], lanes_of(p.C - i));
  }
}

#pragma GCC pop_options

// All bands. block: the channels that the kernel takes at once; bytes_of(band): the scratch memory of a band, a
// multiple of 64; add(band, scratch, sums) adds its tiles to the sums.
template <class T, class Bytes, class Add>
void sum_bands(const ConvArguments<T>& p, int64_t block, T* dweight, Bytes bytes_of, Add add) {
  check(p.R * p.S <= max_taps, "dynamic_conv", "kernel", "of at most 49 taps", p.R * p.S);
  const Sides sides{channels_of(p.route, p.in_sizes, p.C, block), channels_of(p.route, p.out_sizes, p.C_out, block)};
  const int64_t wanted = omp_get_max_threads(), taps = p.R * p.S, items = (p.C_out + 15) / 16 * taps;
  const std::vector<Band> bands = make_bands(p, sides, wanted, 1, bytes_of);
  int64_t most = 0;
  for (const Band& band : bands) most = std::max<int64_t>(most, bytes_of(band));
  std::vector<const float*> sums(wanted, nullptr);
  Failure failure;
#pragma omp parallel num_threads(wanted)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp single
    sums.resize(threads);
    failure.guard([&] {
      float* own = static_cast<float*>(scratch_of_thread(sums_size(p) * 4 + most));
      std::memset(own, 0, sums_size(p) * sizeof(float));
      sums[thread] = own;
      for (int64_t i = thread; i < static_cast<int64_t>(bands.size()); i += threads)
        if (bands[i].inputs.count) add(bands[i], own + sums_size(p), own);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < items; ++i)
      if (!failure.any()) finish(p, sums, i / taps, i % taps, dweight);
  }
  failure.rethrow();
}

}  // namespace
}  // namespace den_kernels
