// A thread takes an instance through the whole graph: its states lie in scratch memory, padded with zeros, where the
// convolutions read them in place (direct_tiles.h) and add what they make, gated, to the state that they lead to.
// States that do not fit the core's cache are computed in bands of rows: a band of the first state, then of the second,
// half a kernel higher up, and so on, so that a row is read while it is in the cache, and nothing is computed twice.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>

#include "check.h"
#include "direct_channels.h"
#include "direct_chunks.h"
#include "direct_tiles.h"
#include "dynamic_graph.h"
#include "openmp.h"

namespace den_kernels {
namespace {

// A state in scratch memory: rows and columns of pixels, zeros around the map. Columns are computed in strips, so that
// some are read beyond the padding.
struct StateMap {
  int64_t rows, columns, origin;  // origin: of the first pixel of the map, in floats
  explicit StateMap(const GraphArguments& p)
      : rows(p.H + p.R - 1), columns(strip_columns(p.W) + p.S - 1), origin((p.R / 2 * columns + p.S / 2) * p.C) {}
  int64_t size(int64_t C) const { return round_up(rows * columns * C, 16); }
};

constexpr int64_t least_band = 4;  // rows: below, the weights are read too often

// Rows of a band: all of them where an instance's states fit the cache, else as many as leave room for those that are
// read again, of as many states as an edge reaches over.
int64_t band_rows(const GraphArguments& p, const StateMap& map) {
  const int64_t room = scratch_bytes(), half = p.R / 2;
  if (p.N * map.size(p.C) * 4 <= 2 * room) return p.H + p.N * half;
  int64_t reach = 1;
  for (const auto& edge : p.edges) reach = std::max(reach, edge.second - edge.first);
  return std::max(least_band, room / (p.N * map.columns * p.C * 4) - (reach + 1) * half);
}

// The data that all instances use.
struct Layout {
  StateMap map;
  Strips strips;
  std::vector<Piece> pieces;  // channels in blocks of 16
  int64_t taps[max_taps];     // offset of each tap from the upper left one
  int64_t band;               // rows of a state that are computed before the next state's
  explicit Layout(const GraphArguments& p)
      : map(p), strips(1, p.W), pieces(cut({{0, p.C}}, 16)), band(band_rows(p, map)) {
    for (int64_t t = 0; t < p.R * p.S; ++t) taps[t] = (t / p.S * map.columns + t % p.S) * p.C;
  }
};

// Rows first .. last - 1 of a map.
struct Rows {
  int64_t first, last;
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// An edge, and where it leads: to += gate * relu(conv(from) + bias).
struct EdgeWork {
  const Layout& layout;
  int64_t C;
  Taps taps;
  int64_t weight_vector;
  const float *weight, *bias, *from;
  float *to, gate;
  EdgeWork(const GraphArguments& p, const Layout& layout, int64_t e, float gate, const float* from, float* to)
      : layout(layout),
        C(p.C),
        taps{layout.taps, p.R * p.S, 0, p.R * p.S},
        weight_vector(weight_words<float>(p.C, p.R * p.S)),
        weight(p.weights[e]),
        bias(p.biases[e]),
        from(from),
        to(to + layout.map.origin),
        gate(gate) {}
};

// The blocks of output channels from `block` of strips from q0.
struct EdgeTile {
  static constexpr int vectors = tile_vectors == 1 ? 1 : 3;
  static constexpr int most(int vectors, int size) { return sum_vectors / (vectors * size); }
  template <int vectors, int strips, int size>
  static void run(const EdgeWork& edge, int64_t block, int64_t q0) {
    Vector acc[strips * size][vectors], bias[vectors];
    sum<vectors, strips, size>(acc, edge, block, q0);
    // What follows is computed from the stack's copies: values that live through the sums take their registers.
    __asm__("" : "+m"(block), "+m"(q0));
    Strips::At strip[strips];
    edge.layout.strips.at(q0, strip);
    const int64_t C = edge.C;
    UNROLL for (int v = 0; v < vectors; ++v) {
      const int64_t first = (block + v) * 16;
      bias[v] = load16(edge.bias + first, lanes_of(C - first));
    }
    add_bias(acc, bias);
    const Vector factor = broadcast(edge.gate);
    UNROLL for (int q = 0; q < strips; ++q) {
      float* pixel = edge.to + (strip[q].row * edge.layout.map.columns + strip[q].column) * C;
      UNROLL for (int i = 0; i < size; ++i) {
        if (i >= strip[q].live) break;
        UNROLL for (int v = 0; v < vectors; ++v) {
          float* at = pixel + i * C + (block + v) * 16;
          const Lanes some = lanes_of(C - (block + v) * 16);
          const Vector made = relu(acc[q * size + i][v]);
          store16(at, fma(factor, made, load16(at, some)), some);
        }
      }
    }
  }
  template <int vectors, int strips, int size>
  KERNEL static void sum(Vector (&acc)[strips * size][vectors], const EdgeWork& edge, int64_t block, int64_t q0) {
    Strips::At strip[strips];
    edge.layout.strips.at(q0, strip);
    const float* input[strips];
    UNROLL for (int q = 0; q < strips; ++q) {
      input[q] = edge.from + (strip[q].row * edge.layout.map.columns + strip[q].column) * edge.C;
    }
    sum_channels<float, vectors, strips, size, false>(acc, input, edge.C, 1, edge.taps,
                                                      edge.weight + block * edge.weight_vector, edge.weight_vector,
                                                      edge.layout.pieces, {});
  }
};

// All strips of rows of some vectors of output channels, in tiles of nearly the same size: few registers sum in a small
// one.
void add_vectors(const EdgeWork& edge, Rows rows, int64_t block, int vectors) {
  const Strips& strips = edge.layout.strips;
  const int64_t size = strips.size, start = strips.count(rows.first), count = strips.count(rows.last) - start;
  const int64_t most = EdgeTile::most(vectors, static_cast<int>(size)), tiles = (count + most - 1) / most;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t begin, end;
    share(count, t, tiles, begin, end);
    tile_of<EdgeTile>(size, vectors, end - begin)(edge, block, start + begin);
  }
}

void add_edge(const EdgeWork& edge, Rows rows) {
  const int64_t blocks = (edge.C + 15) / 16;
  for (int64_t block = 0; block < blocks;) {
    const int64_t left = blocks - block;
    const int taken = left == 1 || EdgeTile::vectors == 1 ? 1 : left == 3 ? 3 : 2;
    add_vectors(edge, rows, block, taken);
    block += taken;
  }
}

// to = factor * from, or added to it, over the rows of a map; strides in floats.
template <bool add>
void scale_rows(float factor, const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < width; ++k) {
      const float value = factor * from[r * from_stride + k];
      to[r * to_stride + k] = add ? to[r * to_stride + k] + value : value;
    }
}

// Some rows of state j, and what of them is read out.
void run_rows(const GraphArguments& p, const Layout& layout, int64_t b, int64_t j, Rows rows, int64_t first_edge,
              float* scratch) {
  const int64_t E = static_cast<int64_t>(p.edges.size()), width = p.W * p.C, pitch = layout.map.columns * p.C;
  const int64_t size = layout.map.size(p.C), count = rows.last - rows.first;
  const int64_t at = (b * p.H + rows.first) * width;
  float *v = scratch + j * size, *inner = v + layout.map.origin + rows.first * pitch;
  if (j == 0) std::memset(p.out + at, 0, count * width * sizeof(float));
  scale_rows<false>(p.read_in[b * p.N + j], p.x + at, width, inner, pitch, count, width);
  for (int64_t e = first_edge; e < E && p.edges[e].second == j; ++e)
    if (p.levels[e * p.B + b] > 0)
      add_edge({p, layout, e, p.gates[b * E + e], scratch + p.edges[e].first * size, v}, rows);
  scale_rows<true>(p.read_out[b * p.N + j], inner, pitch, p.out + at, width, count, width);
}

// The rows of state j that band `number` ends with: half a kernel fewer than those of the state before.
int64_t band_end(const GraphArguments& p, const Layout& layout, int64_t number, int64_t j) {
  return std::clamp<int64_t>(number * layout.band - j * (p.R / 2), 0, p.H);
}

void run_instance(const GraphArguments& p, const Layout& layout, int64_t b, float* scratch) {
  const int64_t E = static_cast<int64_t>(p.edges.size());
  for (int64_t number = 0; band_end(p, layout, number, p.N - 1) < p.H; ++number)
    for (int64_t j = 0, e = 0; j < p.N; ++j) {
      const Rows rows{band_end(p, layout, number, j), band_end(p, layout, number + 1, j)};
      if (rows.first < rows.last) run_rows(p, layout, b, j, rows, e, scratch);
      while (e < E && p.edges[e].second == j) ++e;
    }
}

#pragma GCC pop_options

// Instances, those with most edges first, so that threads end together.
std::vector<int64_t> heavy_first(const GraphArguments& p) {
  std::vector<int64_t> count(p.B), order(p.B);
  for (size_t e = 0; e < p.edges.size(); ++e)
    for (int64_t b = 0; b < p.B; ++b) count[b] += p.levels[e * p.B + b] > 0;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count[a] > count[b]; });
  return order;
}

void run_direct(const GraphArguments& p) {
  check(p.R % 2 && p.S % 2 && p.R * p.S <= max_taps, "dynamic_graph", "kernel", "odd and of at most 49 taps",
        p.R * p.S);
  const Layout layout(p);
  const std::vector<int64_t> order = heavy_first(p);
  const int64_t bytes = p.N * layout.map.size(p.C) * 4, threads = omp_get_max_threads();
  std::atomic<int64_t> next{0};
  share_out(threads, threads, [&](int64_t) {
    if (next >= p.B) return;
    auto* scratch = static_cast<float*>(scratch_of_thread(bytes));
    std::memset(scratch, 0, bytes);  // what lies around the maps is never written again
    for (int64_t i; (i = next++) < p.B;) run_instance(p, layout, order[i], scratch);
  });
}

}  // namespace
}  // namespace den_kernels
