// A thread takes an instance through the whole graph: its states lie in scratch memory, padded with zeros, where the
// convolutions read them in place (direct_tiles.h) and add what they make, gated, to the state that they lead to.
#include "dynamic_graph.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include <omp.h>

#include "check.h"
#include "direct_channels.h"
#include "direct_chunks.h"
#include "dispatch.h"
#ifdef DEN_KERNELS_HAS_AVX512
#include "direct_tiles.h"
#endif

namespace den_kernels {
#ifdef DEN_KERNELS_HAS_AVX512
namespace {

// A state in scratch memory: rows and columns of pixels, zeros around the map. Columns are computed in strips, so that
// some are read beyond the padding.
struct StateMap {
  int64_t rows, columns, origin;  // origin: of the first pixel of the map, in floats
  explicit StateMap(const GraphArguments& p)
      : rows(p.H + p.R - 1), columns(strip_columns(p.W) + p.S - 1), origin((p.R / 2 * columns + p.S / 2) * p.C) {}
  int64_t size(int64_t C) const { return round_up(rows * columns * C, 16); }
};

// The data that all instances use.
struct Layout {
  StateMap map;
  Strips strips;
  std::vector<Piece> pieces;  // channels in blocks of 16
  int64_t taps[max_taps];     // offset of each tap from the upper left one
  explicit Layout(const GraphArguments& p) : map(p), strips(1, p.W), pieces(cut({{0, p.C}}, 16)) {
    for (int64_t t = 0; t < p.R * p.S; ++t) taps[t] = (t / p.S * map.columns + t % p.S) * p.C;
  }
};

#pragma GCC push_options
DEN_KERNELS_TARGET

// The blocks of output channels from `block` of strips from q0: to += gate * relu(conv(from) + bias).
struct EdgeTile {
  // 21 to 28 of 32 registers sum.
  static constexpr int vectors = 3;
  static constexpr int most(int vectors, int size) { return 28 / (vectors * size); }
  template <int vectors, int strips, int size>
  static void run(const GraphArguments& p, const Layout& layout, int64_t e, float gate, const float* from, float* to,
                  int64_t block, int64_t q0) {
    const int64_t weight_vector = weight_words<float>(p.C, p.R * p.S);
    Strips::At strip[strips];
    layout.strips.at(q0, strip);
    const float* input[strips];
    UNROLL for (int q = 0; q < strips; ++q) {
      input[q] = from + (strip[q].row * layout.map.columns + strip[q].column) * p.C;
    }
    __m512 acc[strips * size][vectors];
    UNROLL for (int v = 0; v < vectors; ++v) {
      const int64_t first = (block + v) * 16;
      const __m512 bias = _mm512_maskz_loadu_ps(lanes_of(p.C - first), p.biases[e] + first);
      UNROLL for (int i = 0; i < strips * size; ++i) acc[i][v] = bias;
    }
    sum_channels<float, vectors, strips, size, false>(acc, input, p.C, 1, {layout.taps, p.R * p.S, 0, p.R * p.S},
                                                      p.weights[e] + block * weight_vector, weight_vector,
                                                      layout.pieces, {});
    const __m512 zero = _mm512_setzero_ps(), factor = _mm512_set1_ps(gate);
    UNROLL for (int q = 0; q < strips; ++q) {
      float* pixel = to + layout.map.origin + (input[q] - from);
      UNROLL for (int i = 0; i < size; ++i) {
        if (i >= strip[q].live) break;
        UNROLL for (int v = 0; v < vectors; ++v) {
          float* at = pixel + i * p.C + (block + v) * 16;
          const __mmask16 some = lanes_of(p.C - (block + v) * 16);
          const __m512 made = _mm512_max_ps(zero, acc[q * size + i][v]);  // NaN passes: max gives its second operand
          _mm512_mask_storeu_ps(at, some, _mm512_fmadd_ps(factor, made, _mm512_maskz_loadu_ps(some, at)));
        }
      }
    }
  }
};

// All strips of some vectors of output channels, in tiles of nearly the same size: few registers sum in a small one.
void add_vectors(const GraphArguments& p, const Layout& layout, int64_t e, float gate, const float* from, float* to,
                 int64_t block, int vectors) {
  const int64_t size = layout.strips.size, count = layout.strips.count(p.H);
  const int64_t most = EdgeTile::most(vectors, static_cast<int>(size)), tiles = (count + most - 1) / most;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t begin, end;
    share(count, t, tiles, begin, end);
    tile_of<EdgeTile>(size, vectors, end - begin)(p, layout, e, gate, from, to, block, begin);
  }
}

void add_edge(const GraphArguments& p, const Layout& layout, int64_t e, float gate, const float* from, float* to) {
  const int64_t blocks = (p.C + 15) / 16;
  for (int64_t block = 0; block < blocks;) {
    const int64_t left = blocks - block;
    const int taken = left == 1 ? 1 : left == 3 ? 3 : 2;
    add_vectors(p, layout, e, gate, from, to, block, taken);
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

void run_instance(const GraphArguments& p, const Layout& layout, int64_t b, float* scratch) {
  const int64_t E = static_cast<int64_t>(p.edges.size()), width = p.W * p.C, pitch = layout.map.columns * p.C;
  const int64_t size = layout.map.size(p.C);
  float* out = p.out + b * p.H * width;
  std::memset(out, 0, p.H * width * sizeof(float));
  for (int64_t j = 0, e = 0; j < p.N; ++j) {
    float* v = scratch + j * size;
    float* inner = v + layout.map.origin;
    scale_rows<false>(p.read_in[b * p.N + j], p.x + b * p.H * width, width, inner, pitch, p.H, width);
    for (; e < E && p.edges[e].second == j; ++e)
      if (p.levels[e * p.B + b] > 0) add_edge(p, layout, e, p.gates[b * E + e], scratch + p.edges[e].first * size, v);
    scale_rows<true>(p.read_out[b * p.N + j], inner, pitch, out, width, p.H, width);
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

}  // namespace

void dynamic_graph(const GraphArguments& p) {
  check(p.R % 2 && p.S % 2 && p.R * p.S <= max_taps, "dynamic_graph", "kernel", "odd and of at most 49 taps",
        p.R * p.S);
  const Layout layout(p);
  const std::vector<int64_t> order = heavy_first(p);
  const int64_t bytes = p.N * layout.map.size(p.C) * 4, threads = omp_get_max_threads();
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    float* scratch = nullptr;
    failure.guard([&] {
      scratch = static_cast<float*>(scratch_of_thread(bytes));
      std::memset(scratch, 0, bytes);  // what lies around the maps is never written again
    });
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p.B; ++i)
      if (scratch) run_instance(p, layout, order[i], scratch);
  }
  failure.rethrow();
}

#else

void dynamic_graph(const GraphArguments&) {
  throw std::runtime_error("dynamic_graph: this build has no AVX-512 variant");
}

#endif

}  // namespace den_kernels
