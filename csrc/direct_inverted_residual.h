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
#include <array>
#include <cstring>

#include <omp.h>

#include "check.h"
#include "direct_activation.h"
#include "direct_chunks.h"
#include "direct_sums.h"
#include "dynamic_inverted_residual.h"

namespace den_kernels {
namespace {

using Arguments = InvertedResidual;

constexpr int64_t tile_pixels = 12;  // divisible by the pixels of a tile
constexpr int64_t slack = 8 * 16;    // floats behind a plane of pixels, which strips that end early read

// The channels that all chunks of one selection use.
struct Selected {
  const Channels& hidden;
  const std::vector<Piece>& stream;  // inputs of conv1
  int64_t planes() const { return static_cast<int64_t>(hidden.blocks.size()); }
};

// The selected channels of planes that lie `plane` floats apart, as the inputs of a product.
std::vector<Piece> pieces_of(const Channels& hidden, int64_t plane) {
  std::vector<Piece> pieces;
  size_t i = 0;
  for (const Piece& piece : hidden.pieces) {
    while (hidden.blocks[i].index < piece.first / 16) ++i;
    pieces.push_back({piece.first, piece.width, static_cast<int64_t>(i) * plane + piece.first % 16});
  }
  return pieces;
}

// Instances order[start : start + count] of a route; more than one only where a band is a whole map. In scratch memory:
// `maps`, row sums and gates of all, then of each thread a ring, a band and a list of strips.
struct Chunk {
  const Arguments& block;
  const Selected& selected;
  int64_t start, count;
  int64_t columns;     // of the ring, padding included
  int64_t rows, ring;  // output rows of a band, rows of the ring
  float* scratch = nullptr;

  Chunk(const Arguments& p, const Selected& s, int64_t start, int64_t count)
      : block(p),
        selected(s),
        start(start),
        count(count),
        columns(std::max(p.W + p.S - 1, (p.Wo - 1) * p.stride + p.S)) {
    const auto floats = [&](int64_t r) { return planes() * 16 * (rows_read(r) * columns + (p.conv2 ? r * p.Wo : 0)); };
    const int64_t fits = scratch_bytes() / 4, line = floats(2) - floats(1);
    const int64_t most = std::clamp<int64_t>((fits - floats(1)) / std::max<int64_t>(line, 1) + 1, 1, p.Ho);
    const int64_t bands = (p.Ho + most - 1) / most;
    rows = (p.Ho + bands - 1) / bands;
    if (!p.conv2 && rows < p.Ho) rows = std::max<int64_t>(most / tile_pixels, 1) * tile_pixels;  // whole tiles
    ring = rows_read(rows);
  }
  int64_t planes() const { return selected.planes(); }
  int64_t rows_read(int64_t r) const { return (r - 1) * block.stride + block.R; }
  int64_t ring_plane() const { return count * ring * columns * 16; }
  int64_t plane_of(int64_t pixels) const { return count * pixels * 16 + slack; }
  int64_t map_plane() const { return plane_of(block.Ho * block.Wo); }
  bool in_two(int64_t threads) const { return block.Q || (block.conv2 && threads > 1); }

  int64_t maps_size(int64_t threads) const { return in_two(threads) ? planes() * map_plane() : 0; }
  int64_t sums_size() const { return block.Q ? count * block.Ho * planes() * 16 : 0; }
  int64_t gates_size() const { return block.Q ? count * planes() * 16 : 0; }
  int64_t ring_size() const { return planes() * ring_plane() + (block.conv2 ? 0 : slack); }
  int64_t band_size(int64_t threads) const {
    return in_two(threads) || !block.conv2 ? 0 : planes() * plane_of(rows * block.Wo);
  }
  int64_t strips_size() const;
  int64_t own_size(int64_t threads) const { return round_up(ring_size() + band_size(threads) + strips_size(), 16); }
  int64_t shared_size(int64_t threads) const { return maps_size(threads) + sums_size() + gates_size(); }
  int64_t bytes(int64_t threads) const { return 4 * (shared_size(threads) + threads * own_size(threads)); }

  float* sums(int64_t threads) const { return scratch + maps_size(threads); }
  float* gates(int64_t threads) const { return sums(threads) + sums_size(); }
  float* ring_of(int64_t thread, int64_t threads) const {
    return scratch + shared_size(threads) + thread * own_size(threads);
  }
  const float* x(int64_t instance, int64_t row) const {
    return block.x + (block.route.order[start + instance] * block.H + row) * block.W * block.C;
  }
};

// Chunks of several instances are those whose maps fit scratch memory together.
int64_t times_fitting(const Chunk& c) {
  if (c.rows < c.block.Ho) return 1;
  return std::min(2 * scratch_bytes() / c.bytes(1), chunk_pixels / (c.count * c.block.H * c.block.W));
}

// Where a strip of input pixels begins, and its place in a plane of the ring.
struct StripAt {
  const float* from;
  int64_t to;
};

// The strips of `columns` pixels that lie side by side: the last one ends where they do, and may overlap the one
// before; fewer pixels than a strip are copied, with zeros behind them.
struct RowStrips {
  int64_t columns, size, count;
  explicit RowStrips(int64_t columns) : columns(columns), size(strip_size(columns)), count(strips_of_row(columns)) {}
  bool copied() const { return columns < size; }
  int64_t column(int64_t i) const { return copied() ? 0 : std::min(i * size, columns - size); }
};

// The pixels that lie side by side in both the input and the ring: a row, and without conv2 a whole band of `rows`
// rows.
RowStrips strips_of(const Chunk& c, int64_t rows) { return RowStrips(c.block.conv2 ? c.block.W : rows * c.block.W); }

int64_t Chunk::strips_size() const {
  constexpr int narrow = std::min(usual_strip, other_strip), wide = std::max(usual_strip, other_strip);
  const int64_t lines = count * (block.conv2 ? ring : 1), most = strips_of(*this, ring).columns / narrow + 1;
  return lines * (most * static_cast<int64_t>(sizeof(StripAt)) / 4 + wide * block.C);
}

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

// The list of the strips of input rows first .. last - 1 of all instances; their number.
int64_t list_strips(const Chunk& c, int64_t first, int64_t last, StripAt* list, float* copies) {
  const Arguments& p = c.block;
  const RowStrips strips = strips_of(c, last - first);
  int64_t n = 0;
  for (int64_t j = 0; j < c.count; ++j) {
    for (int64_t row = first; row < (p.conv2 ? last : first + 1); ++row) {
      const float* x = c.x(j, row);
      if (strips.copied()) {
        std::memset(copies, 0, strips.size * p.C * sizeof(float));
        std::memcpy(copies, x, strips.columns * p.C * sizeof(float));
        x = copies, copies += strips.size * p.C;
      }
      const int64_t line = p.conv2 ? row % c.ring : 0, to = ((j * c.ring + line) * c.columns + p.S / 2) * 16;
      for (int64_t i = 0; i < strips.count; ++i) list[n++] = {x + strips.column(i) * p.C, to + strips.column(i) * 16};
    }
  }
  return n;
}

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

// One row of a plane through conv2: rows[r] is where tap row r of the first pixel begins, begin .. end those on the
// map.
struct DepthwiseRow {
  const float* rows[max_taps];
  int64_t begin, end, S, step;  // floats from a pixel to the next
  const float* weight;          // [R, S, 16]
  Vector bias;
  Bounds bounds;
};

template <int pixels>
void sum_depthwise(const DepthwiseRow& row, int64_t first, float* to) {
  Vector acc[pixels];
  UNROLL for (int i = 0; i < pixels; ++i) acc[i] = row.bias;
  for (int64_t r = row.begin; r < row.end; ++r) {
    const float *in = row.rows[r] + first * row.step, *w = row.weight + r * row.S * 16;
    for (int64_t s = 0; s < row.S; ++s, in += 16, w += 16) {
      const Vector weights = load16(w);
      UNROLL for (int i = 0; i < pixels; ++i) acc[i] = fma(load16(in + i * row.step), weights, acc[i]);
    }
  }
  UNROLL for (int i = 0; i < pixels; ++i) store16(to + i * 16, bound(row.bounds, acc[i]));
}

template <int... fewer>
constexpr auto depthwise_by_pixels(std::integer_sequence<int, fewer...>) {
  return std::array{&sum_depthwise<fewer + 1>...};
}

// The sums of a row of `count` pixels.
void depthwise_row(const DepthwiseRow& row, int64_t count, float* to) {
  static constexpr auto parts = depthwise_by_pixels(std::make_integer_sequence<int, depthwise_pixels>{});
  const int64_t number = (count + depthwise_pixels - 1) / depthwise_pixels;
  for (int64_t i = 0; i < number; ++i) {
    int64_t begin, end;
    share(count, i, number, begin, end);
    parts[end - begin - 1](row, begin, to + begin * 16);
  }
}

// The sum of `count` vectors that lie side by side.
void sum_row(const float* from, int64_t count, float* to) {
  Vector sum = zeros();
  for (int64_t i = 0; i < count; ++i) sum = add(sum, load16(from + i * 16));
  store16(to, sum);
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

// activation(weight * from + bias) of the output block `index`: weight [., I] by pack_weights, inputs as in pieces.
void product(const float* weight, int64_t index, int64_t I, const float* bias, Lanes lanes, Activation activation,
             const float* from, const std::vector<Piece>& pieces, float* to) {
  Vector sum = load16(bias + index * 16, lanes);
  const float* own = weight + index * weight_words<float>(I, 1);
  for (const Piece& piece : pieces) {
    const float* w = weights_of(own, piece, 1);
    for (int64_t k = 0; k < piece.width; ++k) sum = fma(load16(w + k * 16), broadcast(from[piece.place + k]), sum);
  }
  store16(to, sum);
  activate(activation, to, 1);
}

// The gates of an instance, from the sums of its rows.
void gate(const Chunk& c, int64_t instance, const float* sums, float* gates) {
  const Arguments& p = c.block;
  const std::vector<Block>& blocks = c.selected.hidden.blocks;
  const int64_t width = c.planes() * 16;
  sums += instance * p.Ho * width, gates += instance * width;
  const Vector share = broadcast(1.f / static_cast<float>(p.Ho * p.Wo));
  for (int64_t n = 0; n < width; n += 16) {
    Vector sum = zeros();
    for (int64_t y = 0; y < p.Ho; ++y) sum = add(sum, load16(sums + y * width + n));
    store16(gates + n, multiply(sum, share));
  }
  std::vector<float> squeezed(round_up(p.Q, 16));
  const std::vector<Piece> means = pieces_of(c.selected.hidden, 16), all = cut({{0, p.Q}}, 16);
  for (int64_t n = 0; n * 16 < p.Q; ++n)
    product(p.squeeze, n, p.M, p.squeeze_bias, lanes_of(p.Q - n * 16), p.squeeze_activation, gates, means,
            &squeezed[n * 16]);
  for (int64_t n = 0; n < c.planes(); ++n)
    product(p.excite, blocks[n].index, p.Q, p.excite_bias, static_cast<Lanes>(blocks[n].lanes), p.gate_activation,
            squeezed.data(), all, gates + n * 16);
}

// `count` pixels of each plane times the gates of their instance.
void apply_gates(const Chunk& c, const float* gates, int64_t plane, int64_t count, float* at) {
  for (int64_t n = 0; n < c.planes(); ++n) {
    const Vector factor = load16(gates + n * 16);
    for (float *to = at + n * plane, *end = to + count * 16; to != end; to += 16)
      store16(to, multiply(load16(to), factor));
  }
}

#pragma GCC pop_options

// Zeros in the columns of padding of a ring.
void clear_padding(const Chunk& c, float* ring) {
  const int64_t left = c.block.S / 2, right = left + c.block.W;
  for (int64_t row = 0; row < c.planes() * c.count * c.ring; ++row, ring += c.columns * 16) {
    std::memset(ring, 0, left * 16 * sizeof(float));
    std::memset(ring + right * 16, 0, (c.columns - right) * 16 * sizeof(float));
  }
}

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

template <class Wait>
void middle_stage(const Chunk& c, int64_t thread, int64_t threads, Wait wait) {
  if (!c.block.Q) return;
  int64_t begin, end;
  share(c.count, thread, threads, begin, end);
  for (int64_t j = begin; j < end; ++j) gate(c, j, c.sums(threads), c.gates(threads));
  wait();
}

void output_stage(const Chunk& c, int64_t thread, int64_t threads) {
  if (!c.in_two(threads)) return;
  const Arguments& p = c.block;
  const int64_t pixels = p.Ho * p.Wo, plane = c.map_plane();
  const int64_t most = std::max<int64_t>(scratch_bytes() / 2 / (c.planes() * 64) / 28, 1) * 28;  // whole tiles
  const std::vector<Piece> pieces = pieces_of(c.selected.hidden, plane);
  for (int64_t j = 0; j < c.count; ++j) {
    int64_t begin, end;
    share(pixels, thread, threads, begin, end);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t count = std::min(most, end - first);
      float* at = c.scratch + (j * pixels + first) * 16;
      if (p.Q) apply_gates(c, c.gates(threads) + j * c.planes() * 16, plane, count, at);
      project(c, j, first, count, at, pieces);
    }
  }
}

// All that an instance without a branch gets: its shortcut, or 0, where that does not lie there already.
void rest_of(const Arguments& p, const std::vector<Channels>& hidden, std::vector<int64_t>& found) {
  for (int64_t s = 0; s < p.route.S && p.shortcut != p.out; ++s)
    for (int64_t i = p.route.offsets[s]; i < p.route.offsets[s + 1] && !hidden[s].count; ++i)
      found.push_back(p.route.order[i]);
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
  std::vector<int64_t> rest;
  rest_of(p, hidden, rest);
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
