// The fused residual block: a warp's part of a convolution, taps of pixels in shared memory times weights.
#pragma once

#include "fused_maps.cuh"

namespace den_kernels {

// A map in shared memory that taps are read from.
struct Source {
  uint32_t at;   // address of row r0 of the first instance
  int row;       // bytes of a pixel
  int H, W, r0;  // size of the map, and its first row that is there
  int pitch;     // pixels of an instance
  int stride;
};

// The rows that a lane hands to load_matrices: of each fragment's pixel the address, and above it one bit for each tap
// that lies in the map.
constexpr int kAddressBits = 18;  // 256 KB
template <int F>
struct Pixels {
  uint32_t packed[F];
};

// Pixel q of fragment f is 16 f + q, counted over `count` instances of `rows` x `columns` pixels from row `y0`.
template <int F>
DEN_KERNELS_DEVICE void locate(const Source& source, int y0, int rows, int columns, int count, int fragment,
                               int fragments, Pixels<F>& pixels) {
  columns = here(columns);
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < F; ++i) {
    const int q = (fragment + i * fragments) * 16 + lane % 16, t = q / (rows * columns), pixel = q % (rows * columns);
    const int y = (y0 + pixel / columns) * source.stride, x = pixel % columns * source.stride;
    const uint32_t in_rows = (y > 0 ? 0007u : 0) | 0070u | (y + 1 < source.H ? 0700u : 0);
    const uint32_t in_columns = (x > 0 ? 0111u : 0) | 0222u | (x + 1 < source.W ? 0444u : 0);
    const uint32_t taps = t < count ? in_rows & in_columns : 0;
    const int at = t < count ? (t * source.pitch + (y - source.r0) * source.W + x) * source.row : 0;
    pixels.packed[i] = (source.at + at + lane / 16 * 16) | taps << kAddressBits;
  }
}

// The words of this thread, kept in shared memory while registers hold something else: 4 kThreads bytes apart.
template <int F>
DEN_KERNELS_DEVICE void keep(const Pixels<F>& pixels, uint32_t at) {
#pragma unroll
  for (int i = 0; i < F; ++i) store_shared(at + 4 * (i * kThreads + thread_id()), Words<1>{{pixels.packed[i]}});
}
template <int F>
DEN_KERNELS_DEVICE void recall(uint32_t at, Pixels<F>& pixels) {
#pragma unroll
  for (int i = 0; i < F; ++i) pixels.packed[i] = load_shared<Words<1>>(at + 4 * (i * kThreads + thread_id())).w[0];
}

// The operands of a warp in one step.
struct Operands {
  uint32_t zero, weights;  // addresses of this lane's rows
  int tap, taps;           // taps of the step
  int k, bytes;            // and bytes of each
  int next_pair;           // bytes between the weights of neighbouring pairs of column fragments
  int rows, pairs;         // fragments and pairs that this warp has, where it has not all
};

// sums [F x 16 pixels, N x 16 channels] += taps of the pixels x weights.
template <class E, int F, int N, bool partial, int FS, int NS>
DEN_KERNELS_DEVICE void multiply(float (&sums)[FS][NS][4], const Source& source, const Pixels<FS>& pixels,
                                 const Operands& o) {
  for (int j = 0; j < o.taps; ++j) {
    const int tap = o.tap + j, offset = ((tap / 3 - 1) * source.W + tap % 3 - 1) * source.row;
    uint32_t rows[F];
#pragma unroll
    for (int i = 0; i < F; ++i)
      rows[i] = (pixels.packed[i] >> (kAddressBits + tap) & 1 ? (pixels.packed[i] & ((1u << kAddressBits) - 1)) + offset
                                                              : o.zero) +
                o.k;
    const uint32_t weights = o.weights + j * o.bytes;
#pragma unroll 1
    for (int k = 0; k < o.bytes; k += 32) {
      uint32_t a[F][4];
#pragma unroll
      for (int i = 0; i < F; ++i)
        if (!partial || i < o.rows) load_matrices(a[i], rows[i] + k);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (partial && n >= o.pairs) break;
        uint32_t b[4];
        load_matrices(b, weights + n * o.next_pair + k);
#pragma unroll
        for (uint32_t& word : b) word = operand_word(E{}, word);
#pragma unroll
        for (int i = 0; i < F; ++i)
          if (!partial || i < o.rows) {
            mma(E{}, sums[i][2 * n], a[i], b[0], b[1]);
            mma(E{}, sums[i][2 * n + 1], a[i], b[2], b[3]);
          }
      }
    }
  }
}

}  // namespace den_kernels
