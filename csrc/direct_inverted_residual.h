// A chunk of instances of one selection goes through the block a band of output rows at a time: conv1 writes the input
// rows that the band reads into a ring of hidden rows, which keeps those that the next band reads again; conv2 writes
// the band's pixels side by side, and conv3 adds its sums to the output. Hidden maps lie in scratch memory as planes of
// 16 channels, [plane][instance][row][column][16], so that each convolution reads neighbouring lines. A plane holds a
// block of 16 channels of which any is selected; the others in it are computed and not read.
//
// Without conv2 every pixel is by itself: a map is one column of pixels, and a band a few of them side by side.
//
// With squeeze and excitation, and where threads share a chunk, conv2 first writes all pixels of the chunk (`maps`), so
// that gates are known, and no thread has overwritten what another reads, when conv3 begins.
#pragma once

#include <algorithm>
#include <cstring>

#include "check.h"
#include "direct_activation.h"
#include "direct_chunks.h"
#include "direct_depthwise.h"
#include "direct_sums.h"
#include "dynamic_inverted_residual.h"
#include "inverted_chunk.h"
#include "inverted_gates.h"
#include "openmp.h"

namespace den_kernels {
namespace {

#pragma GCC push_options
DEN_KERNELS_TARGET

// Bounded sums into planes that lie `plane` floats apart.
struct StorePlanes {
  float* to[most_strips];
  int64_t live, plane;  // live: the pixels of every strip that are kept
  Bounds bounds;
  template <int vectors>
  KERNEL void operator()(int strip, int i, const Vector (&sums)[vectors]) const {
    if (i >= live) return;
    UNROLL for (int v = 0; v < vectors; ++v) store16(to[strip] + v * plane + i * 16, bound(bounds, sums[v]));
  }
};

// Sums added to the shortcut, which lies `shortcut` floats behind the output.
struct StoreSums {
  float* to[most_strips];
  int64_t live[most_strips], pixel, shortcut;
  bool has_shortcut;
  Lanes lanes[2];
  template <int vectors>
  KERNEL void operator()(int strip, int i, const Vector (&sums)[vectors]) const {
    if (i >= live[strip]) return;
    float* at = to[strip] + i * pixel;
    UNROLL for (int v = 0; v < vectors; ++v) {
      const Vector before = has_shortcut ? load16(at + shortcut + v * 16, lanes[v]) : zeros();
      store16(at + v * 16, add(before, sums[v]), lanes[v]);
    }
  }
};

// conv1 and its activation of input rows first .. last - 1, into the ring.
void expand(const Chunk& c, int64_t first, int64_t last, float* ring, StripAt* list) {
  const Arguments& p = c.block;
  const RowStrips line = strips_of(c, last - first);
  float* copies = reinterpret_cast<float*>(list + c.count * (p.conv2 ? c.ring : 1) * line.count);
  const int64_t size = line.size, count = list_strips(c, first, last, list, copies), tap = 0;
  const int64_t most = strips_per_tile(size), weight_vector = weight_words<float>(p.C, 1), plane = c.ring_plane();
  StorePlanes store{{}, std::min(size, line.columns), plane, bounds_of(p.activation)};
  for (int64_t n = 0; n < c.planes(); n += tile_vectors) {
    const Block* block = &c.selected.hidden.blocks[n];
    const int64_t vectors = std::min<int64_t>(tile_vectors, c.planes() - n);
    Vector bias[2];
    load_bias(p.bias1, block, vectors, bias);
    for (int64_t q = 0; q < count; q += most) {
      const int64_t strips = std::min(most, count - q);
      Inputs in{{},
                p.C,
                {&tap, 1, 0, 1},
                c.selected.stream,
                p.conv1 + block[0].index * weight_vector,
                (block[vectors - 1].index - block[0].index) * weight_vector};
      for (int64_t i = 0; i < strips; ++i) in.at[i] = list[q + i].from, store.to[i] = ring + n * plane + list[q + i].to;
      sum_strips(size, strips, vectors, in, bias, store);
    }
    if (is_bound(p.activation)) continue;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t q = 0; q < count; q += line.count)
        activate(p.activation, ring + (n + v) * plane + list[q].to, line.columns);
  }
}

// Without conv1: input rows first .. last - 1 as they are, into the ring.
void copy_rows(const Chunk& c, int64_t first, int64_t last, float* ring) {
  const Arguments& p = c.block;
  for (int64_t n = 0; n < c.planes(); ++n) {
    const int64_t channel = c.selected.hidden.blocks[n].index * 16;
    const Lanes lanes = lanes_of(p.C - channel);
    for (int64_t j = 0; j < c.count; ++j)
      for (int64_t row = first; row < last; ++row) {
        const float* from = c.x(j, row) + channel;
        float* to = ring + n * c.ring_plane() + ((j * c.ring + row % c.ring) * c.columns + p.S / 2) * 16;
        for (int64_t column = 0; column < p.W; ++column, from += p.C, to += 16) store16(to, load16(from, lanes));
      }
  }
}

// conv2 and its activation of output rows first .. last - 1, to the place of row `first` in planes of `plane` floats
// with `pixels` pixels of an instance; and their sums, if asked for.
void depthwise(const Chunk& c, int64_t first, int64_t last, const float* ring, float* to, int64_t plane, int64_t pixels,
               float* sums) {
  const Arguments& p = c.block;
  DepthwiseRow row{};
  row.S = p.S, row.step = p.stride * 16, row.bounds = bounds_of(p.activation);
  for (int64_t n = 0; n < c.planes(); ++n) {
    const Block& block = c.selected.hidden.blocks[n];
    row.weight = p.conv2 + block.index * p.R * p.S * 16;
    row.bias = load16(p.bias2 + block.index * 16, static_cast<Lanes>(block.lanes));
    for (int64_t j = 0; j < c.count; ++j) {
      const float* rows = ring + n * c.ring_plane() + j * c.ring * c.columns * 16;
      float* out = to + n * plane + j * pixels * 16;
      for (int64_t y = first; y < last; ++y, out += p.Wo * 16) {
        const int64_t top = y * p.stride - p.R / 2;
        row.begin = std::max<int64_t>(0, -top), row.end = std::min(p.R, p.H - top);
        for (int64_t r = row.begin; r < row.end; ++r) row.rows[r] = rows + (top + r) % c.ring * c.columns * 16;
        depthwise_row(row, p.Wo, out);
        if (!is_bound(p.activation)) activate(p.activation, out, p.Wo);
        if (sums) sum_row(out, p.Wo, sums + ((j * p.Ho + y) * c.planes() + n) * 16);
      }
    }
  }
}

// conv3 of `count` pixels of an instance from pixel `first` on, added to the shortcut; `from`: their place in the first
// plane.
void project(const Chunk& c, int64_t instance, int64_t first, int64_t count, const float* from,
             const std::vector<Piece>& pieces) {
  const Arguments& p = c.block;
  const int64_t size = strip_size(count), most = strips_per_tile(size), strips = (count + size - 1) / size, tap = 0;
  const int64_t weight_vector = weight_words<float>(p.M, 1), blocks = (p.C_out + 15) / 16;
  float* out = p.out + (p.route.order[c.start + instance] * p.Ho * p.Wo + first) * p.C_out;
  StoreSums store{{}, {}, p.C_out, p.shortcut ? p.shortcut - p.out : 0, p.shortcut != nullptr, {}};
  for (int64_t n = 0; n < blocks; n += tile_vectors) {
    const int64_t vectors = std::min<int64_t>(tile_vectors, blocks - n);
    Vector bias[2] = {zeros(), zeros()};
    for (int64_t v = 0; v < vectors; ++v) {
      store.lanes[v] = lanes_of(p.C_out - (n + v) * 16);
      if (p.bias3) bias[v] = load16(p.bias3 + (n + v) * 16, store.lanes[v]);
    }
    for (int64_t q = 0; q < strips; q += most) {
      const int64_t together = std::min(most, strips - q);
      Inputs in{{}, 16, {&tap, 1, 0, 1}, pieces, p.conv3 + n * weight_vector, weight_vector};
      for (int64_t i = 0; i < together; ++i) {
        const int64_t pixel = (q + i) * size;
        in.at[i] = from + pixel * 16;
        store.to[i] = out + pixel * p.C_out + n * 16;
        store.live[i] = std::min(size, count - pixel);
      }
      sum_strips(size, together, vectors, in, bias, store);
    }
  }
}

#pragma GCC pop_options

// Output rows begin .. end - 1 by one thread, band by band: all of the block, or `in_two` up to conv2.
void run_rows(const Chunk& c, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
  const Arguments& p = c.block;
  const bool in_two = c.in_two(threads);
  float *ring = c.ring_of(thread, threads), *band = p.conv2 ? ring + c.ring_size() : ring;
  StripAt* list = reinterpret_cast<StripAt*>(ring + c.ring_size() + c.band_size(threads));
  const int64_t plane = !p.conv2 ? c.ring_plane() : in_two ? c.map_plane() : c.plane_of(c.rows * p.Wo);
  const std::vector<Piece> pieces = in_two ? std::vector<Piece>() : pieces_of(c.selected.hidden, plane);
  clear_padding(c, ring);
  int64_t done = 0;  // input rows before it are in the ring, or not read any more
  for (int64_t y = begin; y < end; y += c.rows) {
    const int64_t last = std::min(y + c.rows, end);
    done = std::max(done, y * p.stride - p.R / 2);
    const int64_t needed = std::min(p.H, (last - 1) * p.stride - p.R / 2 + p.R);
    if (needed > done) p.conv1 ? expand(c, done, needed, ring, list) : copy_rows(c, done, needed, ring);
    done = std::max(done, needed);
    const int64_t pixels = in_two ? p.Ho * p.Wo : c.rows * p.Wo;
    if (p.conv2)
      depthwise(c, y, last, ring, in_two ? c.scratch + y * p.Wo * 16 : band, plane, pixels,
                p.Q ? c.sums(threads) : nullptr);
    for (int64_t j = 0; j < c.count && !in_two; ++j)
      project(c, j, y * p.Wo, (last - y) * p.Wo, band + j * pixels * 16, pieces);
  }
}

void input_stage(const Chunk&, int64_t, int64_t) {}

void hidden_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.block.Ho, thread, threads, begin, end);
  if (begin < end) run_rows(c, begin, end, thread, threads);
}

bool has_middle(const Chunk& c) { return c.block.Q; }
int64_t parts_for_each(const Chunk&) { return 1; }  // neighbours expand the same rows

void middle_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.count, thread, threads, begin, end);
  for (int64_t j = begin; j < end; ++j) gate(c, j, c.sums(threads), c.gates(threads));
}

void output_stage(const Chunk& c, int64_t thread, int64_t threads) {
  if (!c.in_two(threads)) return;
  const Arguments& p = c.block;
  const int64_t pixels = p.Ho * p.Wo, plane = c.map_plane();
  const int64_t fits = scratch_bytes() / 2 / (c.planes() * 64),
                most = std::max<int64_t>(fits / tile_pixels, 1) * tile_pixels;
  const std::vector<Piece> pieces = pieces_of(c.selected.hidden, plane);
  for (int64_t j = 0; j < c.count; ++j) {
    // Whole strips: one that ends early would read pixels to which the next thread applies its gates.
    int64_t begin, end;
    share((pixels + usual_strip - 1) / usual_strip, thread, threads, begin, end);
    begin *= usual_strip, end = std::min(end * usual_strip, pixels);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t count = std::min(most, end - first);
      float* at = c.scratch + (j * pixels + first) * 16;
      if (p.Q) apply_gates(c, c.gates(threads) + j * c.planes() * 16, plane, count, at);
      project(c, j, first, count, at, pieces);
    }
  }
}

void run_direct(Arguments p) {
  constexpr char op[] = "dynamic_inverted_residual";
  if (!p.conv2) p.H = p.Ho = p.H * p.W, p.W = p.Wo = 1;
  check(p.R % 2 && p.S % 2 && p.R * p.S <= max_taps, op, "kernel", "odd and at most 7 x 7", p.R * p.S);
  const int64_t threads = omp_get_max_threads(), size = p.Ho * p.Wo * p.C_out;
  const std::vector<Channels> hidden = channels_of(p.route, p.sizes, p.M, 16);
  const std::vector<Piece> stream = cut({{0, p.C}}, 16);
  std::vector<Selected> selected;
  for (const Channels& channels : hidden) selected.push_back({channels, stream});
  const std::vector<int64_t> rest = without_branch(p, hidden);
  const auto make = [&](int64_t start, int64_t count, const Channels& chosen) {
    return Chunk(p, selected[&chosen - hidden.data()], start, count);
  };
  run_chunks(make_chunks(p, hidden, threads, 1, make), threads, static_cast<int64_t>(rest.size()), [&](int64_t i) {
    float* to = p.out + rest[i] * size;
    if (p.shortcut)
      std::memcpy(to, p.shortcut + rest[i] * size, size * sizeof(float));
    else
      std::memset(to, 0, size * sizeof(float));
  });
}

}  // namespace
}  // namespace den_kernels
