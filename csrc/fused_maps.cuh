// The fused residual block: the instances and rows that a thread block takes, and the way of x into shared memory.
#pragma once

#include <cmath>

#include "fused_layout.h"
#include "ptx.cuh"

namespace den_kernels {

constexpr int kThreads = 32 * kFusedWarps;

struct Arguments {
  FusedResidual block;
  FusedShared shared;
};

DEN_KERNELS_DEVICE int thread_id() { return here(static_cast<int>(threadIdx.x)); }
DEN_KERNELS_DEVICE int lane_id() { return thread_id() % 32; }
DEN_KERNELS_DEVICE int warp_id() { return thread_id() / 32; }
DEN_KERNELS_DEVICE int least(int a, int b) { return a < b ? a : b; }
DEN_KERNELS_DEVICE int most(int a, int b) { return a > b ? a : b; }

DEN_KERNELS_DEVICE const unsigned char* bytes_of(const void* p) { return static_cast<const unsigned char*>(p); }

// Instances order[first:first + count], all of one level.
struct Tile {
  int first, count, width;
};

// Output rows [y0, y1) of a map, the hidden rows [h0, h1) that they need, and the input rows [r0, r1) that those need.
struct Band {
  int y0, y1, h0, h1, r0, r1;
};

// Tiles of `instances` instances of one level, in the route's order; `tile` < 0 counts them.
DEN_KERNELS_DEVICE int find_tile(const FusedResidual& p, int tile, Tile& found) {
  const int segments = p.holds_shortcut ? p.G : p.G + 1, T = here(p.layout.instances);
  int before = 0;
  for (int s = 0; s < segments; ++s) {
    const int first = p.offsets[s], count = p.offsets[s + 1] - first, tiles = (count + T - 1) / T;
    const int place = tile - before;
    if (place >= 0 && place < tiles) found = {first + place * T, least(T, count - place * T), p.widths[p.G - s]};
    before += tiles;
  }
  return before;
}

// The band from output row y0. Computed anew at each use, which takes fewer registers than keeping it.
DEN_KERNELS_DEVICE Band band_at(const FusedResidual& p, int y0) {
  Band band;
  band.y0 = here(y0);
  band.y1 = least(p.Ho, band.y0 + p.layout.rows);
  band.h0 = most(0, band.y0 - 1);
  band.h1 = least(p.Ho, band.y1 + 1);
  band.r0 = most(0, band.h0 * p.stride - 1);
  band.r1 = least(p.H, (band.h1 - 1) * p.stride + 2);
  return band;
}

// out = shortcut(x) for rows [y0, y1) of the tile: the mean over windows of stride x stride, then channels of zeros.
template <class E>
DEN_KERNELS_DEVICE void write_shortcut(const FusedResidual& p, const Tile& tile, int y0, int y1, bool clip) {
  using Pair = typename E::Pair;
  const int pairs = here(p.C_out / 2), columns = here(p.Wo), pixels = (y1 - y0) * columns;
  for (int i = thread_id(); i < tile.count * pixels * pairs; i += kThreads) {
    const int pixel = i / pairs % pixels, c = i % pairs * 2;
    const int64_t b = p.order[tile.first + i / pairs / pixels];
    const int yo = y0 + pixel / columns, xo = pixel % columns;
    const int high = least(p.stride, p.H - yo * p.stride), wide = least(p.stride, p.W - xo * p.stride);
    Float2 sum = {0.f, 0.f};
    for (int j = 0; j < high * wide && c < p.C; ++j) {
      const int64_t from = (b * p.H + yo * p.stride + j / wide) * p.W + xo * p.stride + j % wide;
      const Float2 v = unpack(E{}, load_global<Pair>(bytes_of(p.x) + (from * p.C + c) * E::bytes));
      sum = {sum.lo + v.lo, sum.hi + v.hi};
    }
    const float share = 1.f / static_cast<float>(high * wide);
    sum = {sum.lo * share, sum.hi * share};
    if (clip) sum = {relu(sum.lo), relu(sum.hi)};
    const int64_t to = ((b * p.Ho + yo) * p.Wo + xo) * p.C_out + c;
    store_global(static_cast<unsigned char*>(p.out) + to * E::bytes, pack(E{}, sum));
  }
}

// The rows that the last band read and this one needs again, to the front. One instance.
DEN_KERNELS_DEVICE void keep_rows(const Arguments& arguments, uint32_t act, const Band& band) {
  const Band last = band_at(arguments.block, band.y0 - arguments.block.layout.rows);
  const int row = arguments.block.W * arguments.shared.act_row;
  for (int r = band.r0; r < last.r1; ++r) {
    for (int i = thread_id() * 16; i < row; i += kThreads * 16)
      store_shared(act + (r - band.r0) * row + i, load_shared<Words<4>>(act + (r - last.r0) * row + i));
    sync_block();
  }
}

// bn1 of the channels of 16 bytes, as factors and offsets; of none where the block has no bn1.
template <class E>
struct Affine {
  static constexpr int channels = 16 / E::bytes;
  float scale[channels], shift[channels];

  DEN_KERNELS_DEVICE void load(const FusedResidual& p, int c) {
#pragma unroll
    for (int i = 0; i < channels; ++i) {
      scale[i] = p.scale1 ? p.scale1[c + i] : 1.f;
      shift[i] = p.scale1 ? p.shift1[c + i] : 0.f;
    }
  }
  // 16 bytes of x through bn1 and ReLU.
  DEN_KERNELS_DEVICE Words<4> activate(Words<4> words, bool active) const {
    constexpr int pairs = channels / 2, per_pair = 4 / pairs;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      typename E::Pair pair;
      for (int w = 0; w < per_pair; ++w) pair.w[w] = words.w[i * per_pair + w];
      Float2 v = unpack(E{}, pair);
      if (active)
        v = {relu(fmaf(v.lo, scale[2 * i], shift[2 * i])), relu(fmaf(v.hi, scale[2 * i + 1], shift[2 * i + 1]))};
      pair = operand(E{}, v);
      for (int w = 0; w < per_pair; ++w) words.w[i * per_pair + w] = pair.w[w];
    }
    return words;
  }
};

// For sm_100 and sm_120 ptxas 13.0 spills registers of the fixed chunks below.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFixedChunks = false;
#else
constexpr bool kFixedChunks = true;
#endif

// Input rows [from, band.r1) of the tile's instances, activated, to shared memory. `fixed`: a thread has the same 16
// bytes of every pixel, so that it needs one part of bn1 and no division.
template <class E, bool fixed>
DEN_KERNELS_DEVICE void load_rows(const Arguments& arguments, uint32_t act, const Tile& tile, const Band& band,
                                  int from) {
  constexpr int kFlight = 4;  // loads that a thread has on their way
  const FusedResidual& p = arguments.block;
  const FusedShared& s = arguments.shared;
  const int chunks = here(p.C * E::bytes / 16), count = (band.r1 - from) * p.W * chunks;
  const int own_chunk = thread_id() % chunks, own_pixel = thread_id() / chunks, next = kThreads / chunks;
  const bool active = p.scale1 != nullptr;
  Affine<E> affine;
  if (fixed) affine.load(p, own_chunk * Affine<E>::channels);
  for (int t = 0; t < tile.count; ++t) {
    const int64_t pixel = (static_cast<int64_t>(p.order[tile.first + t]) * p.H + from) * p.W;
    const unsigned char* x = bytes_of(p.x) + pixel * p.C * E::bytes;
    const uint32_t to = act + (t * s.in_rows + from - band.r0) * p.W * s.act_row;
    for (int first = thread_id(), round = 0; first < count; first += kFlight * kThreads, round += kFlight) {
      Words<4> words[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j)
        if (first + j * kThreads < count) words[j] = load_global<Words<4>>(x + (first + j * kThreads) * 16);
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        const int i = first + j * kThreads;
        if (i >= count) continue;
        const int place = fixed ? own_pixel + (round + j) * next : i / chunks;
        const int chunk = fixed ? own_chunk : i - place * chunks;
        if (!fixed) affine.load(p, chunk * Affine<E>::channels);
        store_shared(to + place * s.act_row + chunk * 16, affine.activate(words[j], active));
      }
    }
  }
}

// The band's activations to shared memory, and its shortcut to `out` where that is the kernel's to write.
template <class E>
DEN_KERNELS_DEVICE void load_band(const Arguments& arguments, const Tile& tile, int y0) {
  const FusedResidual& p = arguments.block;
  const uint32_t act = shared_address() + arguments.shared.act;
  const Band band = band_at(p, y0);
  if (y0 > 0) keep_rows(arguments, act, band);
  const int from = y0 > 0 ? band_at(p, y0 - p.layout.rows).r1 : 0;
  if (kFixedChunks && kThreads % (p.C * E::bytes / 16) == 0)
    load_rows<E, true>(arguments, act, tile, band, from);
  else
    load_rows<E, false>(arguments, act, tile, band, from);
  if (!p.holds_shortcut) write_shortcut<E>(p, tile, band.y0, band.y1, false);
}

}  // namespace den_kernels
