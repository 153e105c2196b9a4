// A chunk of instances of one selection goes through the block together. First conv1, a band of pixels at a time: bn1
// and ReLU write these side by side into scratch memory, conv1 writes a zero-padded hidden map. Then, again a band at a
// time, conv2 writes its pixels side by side and conv3 adds its sums to the output. Nothing but the input is read from
// main memory, and nothing but the output written. Where there are fewer chunks than threads can share, all threads
// share the bands of each. The inner loops are those of direct_tiles.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "check.h"
#include "direct_cardinality.h"
#include "direct_chunks.h"
#include "direct_sums.h"
#include "dynamic_bottleneck.h"
#include "openmp.h"

namespace den_kernels {
namespace {

using Arguments = BottleneckArguments<float>;

// The channels that all chunks of one selection use.
struct Selected {
  const Channels& hidden;
  std::vector<Piece> stream;  // inputs of conv1
  // Inputs of conv2, by cardinality group, counted from its first channel; of narrow groups none.
  std::vector<std::vector<Piece>> inputs;
};

// Instances order[start : start + count] of a route. In scratch memory: their hidden maps, and behind these a band of
// each thread.
struct Chunk {
  const Arguments& block;
  const Selected& selected;
  int64_t start, count;
  Strips in, out;   // strips of the input and the output
  int64_t columns;  // columns of the hidden map: padding, and all that strips of outputs read
  float* scratch = nullptr;
  Chunk(const Arguments& p, const Selected& s, int64_t start, int64_t count)
      : block(p),
        selected(s),
        start(start),
        count(count),
        in(count, p.W),
        out(count, p.Wo),
        columns(std::max(p.W + p.S - 1, (strip_columns(p.Wo) - 1) * p.stride + p.S)) {}
  int64_t width() const { return selected.hidden.count; }
  int64_t pixel() const { return spread(width()); }  // floats of one, in the hidden map
  int64_t map_size() const { return (block.H + block.R - 1) * columns * pixel(); }
  int64_t maps_size() const { return round_up(count * map_size(), 16); }
  int64_t band_size() const;
  int64_t bytes(int64_t threads) const { return 4 * (maps_size() + threads * band_size()); }
  float* band_of(int64_t thread) const { return scratch + maps_size() + thread * band_size(); }
};

// Strips of a band: as many as keep their pixels of `channels` channels in half of the scratch memory.
int64_t band_strips(const Strips& strips, int64_t channels) {
  const int64_t fits = scratch_bytes() / 2 / (strips.size * spread(channels) * 4), most = strips_per_tile(strips.size);
  return std::max<int64_t>(fits / most, 1) * most;
}

int64_t Chunk::band_size() const {
  const int64_t first = band_strips(in, block.C) * in.size * spread(block.C);
  const int64_t second = band_strips(out, width()) * out.size * pixel();
  return round_up(std::max(first, second), 16);
}

// A chunk's hidden maps alone: the bands are the same for any number of instances.
int64_t times_fitting(const Chunk& c) { return scratch_bytes() / (4 * c.maps_size()); }

#pragma GCC push_options
DEN_KERNELS_TARGET

// A band's pixels, activated, side by side.
void activate(const Chunk& c, int64_t first, int64_t count, float* to) {
  const Arguments& p = c.block;
  const int64_t pixel = spread(p.C);
  Strips::At at = c.in.at(first);
  for (int64_t q = 0; q < count; ++q, at = c.in.after(at)) {
    const float* x = p.x + ((p.route.order[c.start + at.instance] * p.H + at.row) * p.W + at.column) * p.C;
    for (int64_t i = 0; i < c.in.size; ++i, to += pixel, x += p.C) {
      if (i >= at.live) {
        std::memset(to, 0, p.C * sizeof(float));
      } else if (!p.scale1) {
        std::memcpy(to, x, p.C * sizeof(float));
      } else {
        for (int64_t k = 0; k < p.C; k += 16)
          store16(to + k, relu(fma(load16(x + k), load16(p.scale1 + k), load16(p.shift1 + k))));
      }
    }
  }
}

// relu(sums) of the channels of one or two blocks into a map of the selected channels alone.
struct StoreHidden {
  float* to[most_strips];     // the first pixel of each strip
  int64_t live[most_strips];  // the number of its pixels that are kept
  int64_t pixel;              // floats from a pixel to the next
  Block blocks[2];
  template <int vectors>
  KERNEL void operator()(int strip, int i, const Vector (&sums)[vectors]) const {
    if (i >= live[strip]) return;
    UNROLL for (int v = 0; v < vectors; ++v) {
      float* at = to[strip] + i * pixel + blocks[v].place;
      store_words<float>(at, relu(sums[v]), blocks[v].lanes, blocks[v].lanes);
    }
  }
};

// Sums added to the shortcut, which lies `shortcut` floats behind the output.
struct StoreOutput {
  float* to[most_strips];
  int64_t live[most_strips], pixel, shortcut;
  Vector least;
  template <int vectors>
  KERNEL void operator()(int strip, int i, const Vector (&sums)[vectors]) const {
    if (i >= live[strip]) return;
    float* at = to[strip] + i * pixel;
    UNROLL for (int v = 0; v < vectors; ++v) {
      store16(at + v * 16, at_least(least, add(load16(at + shortcut + v * 16), sums[v])));
    }
  }
};

// conv1 of a band of strips of the input, into the hidden maps.
void first_band(const Chunk& c, int64_t first, int64_t count, float* scratch) {
  const Arguments& p = c.block;
  const Channels& chosen = c.selected.hidden;
  const int64_t tap = 0, from_pixel = spread(p.C), pixel = c.pixel(), weight_vector = weight_words<float>(p.C, 1);
  activate(c, first, count, scratch);
  const int64_t blocks = static_cast<int64_t>(chosen.blocks.size());
  for (int64_t n = 0; n < blocks; n += tile_vectors) {
    const Block* block = &chosen.blocks[n];
    const int64_t vectors = std::min<int64_t>(tile_vectors, blocks - n), most = strips_per_tile(c.in.size, vectors);
    Vector bias[2];
    load_bias(p.bias1, block, vectors, bias);
    StoreHidden store{{}, {}, pixel, {block[0], block[vectors - 1]}};
    for (int64_t q = 0, tile = 1, strips; q < count; q += strips) {
      strips = tile_begin(count, most, tile++) - q;
      Inputs in{{},
                from_pixel,
                {&tap, 1, 0, 1},
                c.selected.stream,
                p.conv1 + block[0].index * weight_vector,
                (block[vectors - 1].index - block[0].index) * weight_vector};
      Strips::At at = c.in.at(first + q);
      for (int64_t i = 0; i < strips; ++i, at = c.in.after(at)) {
        in.at[i] = scratch + (q + i) * c.in.size * from_pixel;
        store.to[i] =
            c.scratch + at.instance * c.map_size() + ((at.row + p.R / 2) * c.columns + at.column + p.S / 2) * pixel;
        store.live[i] = at.live;
      }
      sum_strips(c.in.size, strips, vectors, in, bias, store);
    }
  }
}

// conv2 of a band of strips of the output, side by side into the band's memory. Its tiles go down the columns of strips
// where the band has whole rows, so that those at a map's left or right edge leave out the taps on padding there.
void middle_band(const Chunk& c, int64_t first, int64_t count, float* scratch) {
  const Arguments& p = c.block;
  const Channels& chosen = c.selected.hidden;
  const int64_t tap_count = p.R * p.S, unit = p.M / p.cardinality;
  const int64_t pixel = c.pixel(), size = c.out.size, blocks = static_cast<int64_t>(chosen.blocks.size());
  int64_t taps[max_taps];
  for (int64_t t = 0; t < tap_count; ++t) taps[t] = (t / p.S * c.columns + t % p.S) * pixel;
  const int64_t weight_vector = weight_words<float>(unit, tap_count);
  const bool narrow = narrow_groups(unit);
  const int64_t rows = count % c.out.per_row ? 1 : count / c.out.per_row, step = rows > 1 ? c.out.per_row : 1;
  const auto strip_at = [&](int64_t q) { return rows > 1 ? q % rows * step + q / rows : q; };
  for (int64_t n = 0; n < blocks;) {
    const Block* block = &chosen.blocks[n];
    const int64_t group = narrow ? 0 : block->index * 16 / unit;
    const bool two = tile_vectors > 1 && !narrow && n + 1 < blocks && block[1].index * 16 / unit == group;
    const int64_t most = strips_per_tile(size, 1 + two);
    Vector bias[2];
    load_bias(p.bias2, block, 1 + two, bias);
    StoreHidden store{{}, {}, pixel, {block[0], block[two]}};
    std::fill_n(store.live, most_strips, size);
    for (int64_t q = 0, tile = 1, strips; q < count; q += strips) {
      strips = tile_begin(count, most, tile++) - q;
      Inputs in{{},
                pixel * p.stride,
                {},
                c.selected.inputs[group],
                p.conv2 + block[0].index * weight_vector,
                (block[two].index - block[0].index) * weight_vector};
      int64_t top = p.Ho, bottom = 0, column = -1;
      bool one_column = true;
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t strip = strip_at(q + i);
        const Strips::At at = c.out.at(first + strip);
        in.at[i] = c.scratch + at.instance * c.map_size() + (at.row * c.columns + at.column) * p.stride * pixel;
        if (narrow) in.at[i] += block->place;
        store.to[i] = scratch + strip * size * pixel;
        top = std::min(top, at.row), bottom = std::max(bottom, at.row);
        one_column &= column < 0 || column == at.column;
        column = at.column;
      }
      in.taps = taps_on_map(taps, p.R, p.S, top, bottom, p.stride, 1, p.R / 2, p.R / 2 + p.H - 1);
      if (one_column) find_columns(in.taps, column, size, {p.S, p.stride, 1, p.S / 2, p.W});
      if (narrow)
        sum_groups(size, strips, unit, in, bias[0], store);
      else
        sum_strips(size, strips, 1 + two, in, bias, store);
    }
    n += 1 + two;
  }
}

// conv3 of that band, added to the shortcut.
void last_band(const Chunk& c, int64_t first, int64_t count, const float* scratch) {
  const Arguments& p = c.block;
  const int64_t weight_vector = weight_words<float>(p.M, 1), pixel = c.pixel();
  const int64_t tap = 0;
  StoreOutput store{{}, {}, p.C_out, p.shortcut - p.out, broadcast(least_of(p))};
  for (int64_t n = 0; n < p.C_out / 16; n += tile_vectors) {
    const int64_t vectors = std::min<int64_t>(tile_vectors, p.C_out / 16 - n);
    const int64_t most = strips_per_tile(c.out.size, vectors);
    Vector bias[2] = {zeros(), zeros()};
    for (int64_t v = 0; p.bias3 && v < vectors; ++v) bias[v] = load16(p.bias3 + (n + v) * 16);
    for (int64_t q = 0, tile = 1, strips; q < count; q += strips) {
      strips = tile_begin(count, most, tile++) - q;
      Inputs in{{}, pixel, {&tap, 1, 0, 1}, c.selected.hidden.pieces, p.conv3 + n * weight_vector, weight_vector};
      Strips::At at = c.out.at(first + q);
      for (int64_t i = 0; i < strips; ++i, at = c.out.after(at)) {
        in.at[i] = scratch + (q + i) * c.out.size * pixel;
        const int64_t row = p.route.order[c.start + at.instance] * p.Ho + at.row;
        store.to[i] = p.out + (row * p.Wo + at.column) * p.C_out + n * 16;
        store.live[i] = at.live;
        for (int64_t k = 0; k < at.live; ++k)  // asked for now: it is in the cache when the sums are done
          _mm_prefetch(reinterpret_cast<const char*>(store.to[i] + store.shortcut + k * p.C_out), _MM_HINT_T0);
      }
      sum_strips(c.out.size, strips, vectors, in, bias, store);
    }
  }
}

#pragma GCC pop_options

// A thread's share of the strips of `rows` rows, band by band: work(first strip, strips).
template <class Work>
void run_bands(const Strips& strips, int64_t rows, int64_t channels, int64_t thread, int64_t threads, Work work) {
  const int64_t most = strips_per_tile(strips.size), count = strips.count(rows), length = band_strips(strips, channels);
  int64_t begin, end;
  share((count + most - 1) / most, thread, threads, begin, end);
  end = std::min(end * most, count);
  for (int64_t first = begin * most; first < end; first += length) work(first, std::min(length, end - first));
}

// Zeros around the hidden maps; the input is activated band by band.
void input_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.count, thread, threads, begin, end);
  std::memset(c.scratch + begin * c.map_size(), 0, (end - begin) * c.map_size() * sizeof(float));
}

void hidden_stage(const Chunk& c, int64_t thread, int64_t threads) {
  run_bands(c.in, c.block.H, c.block.C, thread, threads,
            [&, scratch = c.band_of(thread)](int64_t first, int64_t count) { first_band(c, first, count, scratch); });
}

void output_stage(const Chunk& c, int64_t thread, int64_t threads) {
  float* scratch = c.band_of(thread);
  run_bands(c.out, c.block.Ho, c.width(), thread, threads, [&](int64_t first, int64_t count) {
    middle_band(c, first, count, scratch);
    last_band(c, first, count, scratch);
  });
}

int64_t parts_for_each(const Chunk&) { return 1; }  // each has a band of its own

std::vector<std::vector<Piece>> inputs_by_group(const Arguments& p, const Channels& hidden) {
  std::vector<std::vector<Piece>> found(p.cardinality);
  const int64_t unit = p.M / p.cardinality;
  if (narrow_groups(unit)) return found;
  for (const Piece& piece : hidden.pieces) {
    const int64_t group = piece.first / unit;
    found[group].push_back({piece.first - group * unit, piece.width, piece.place});
  }
  return found;
}

void run_direct(const BottleneckArguments<float>& p) {
  constexpr char op[] = "dynamic_bottleneck";
  check(p.C % 16 == 0 && p.C_out % 16 == 0, op, "channels", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  const int64_t unit = p.M / p.cardinality;
  check(p.M % 16 == 0 && (unit % 16 == 0 || narrow_groups(unit)), op, "hidden channels of a cardinality group",
        "divisible by 16, or 1, 2, 4 or 8", unit);
  for (const int64_t size : p.sizes)
    check(unit % 16 == 0 || size % 16 == 0, op, "sizes over narrow cardinality groups", "divisible by 16", size);
  check(p.R % 2 && p.S % 2 && p.R * p.S <= max_taps, op, "kernel", "odd and at most 7 x 7", p.R * p.S);
  const std::vector<Channels> hidden = channels_of(p.route, p.sizes, p.M, 16);
  std::vector<Selected> selected;
  for (const Channels& channels : hidden)
    selected.push_back({channels, cut({{0, p.C}}, 16), inputs_by_group(p, channels)});
  run_instances(p, hidden, omp_get_max_threads(), 1, [&](int64_t start, int64_t count, const Channels& chosen) {
    return Chunk(p, selected[&chosen - hidden.data()], start, count);
  });
}

}  // namespace
}  // namespace den_kernels
