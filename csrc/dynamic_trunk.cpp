#include "dynamic_trunk.h"

#include <algorithm>
#include <numeric>

#include <omp.h>

#include "dispatch.h"
#include "numbers.h"
#include "parallel.h"
#include "rows.h"

namespace den_kernels {
namespace {

// Most instances of a chunk. A larger chunk reads its weights for more instances at once, but the other threads wait
// longer for the last one.
constexpr int64_t most_instances = 32;
// Pixels of the maps that go through a stage's blocks together: enough to hide how weights come in from the
// second-level cache, few enough that the residual stream stays there; more where the weights do not fit in it.
constexpr int64_t stage_pixels = 1024, stage_pixels_of_large = 2048, large_weights = 1 << 20;

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, float> ? Dtype::float32 : Dtype::bfloat16;

// The sizes of the map that a block reads, and its stride and output channels.
struct Shape {
  int64_t H, W, C, stride, C_out;
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }
  bool kept() const { return stride == 1 && C == C_out; }
};

template <class T>
Shape shape_of(const TrunkBlock<T>& block, int64_t H, int64_t W) {
  return std::visit([&](const auto& b) { return Shape{H, W, b.C, b.stride, b.C_out}; }, block);
}

// Multiply-adds of an instance that uses `width` hidden channels.
template <class T>
int64_t cost_of(const ResidualBlock<T>& b, const Shape& s, int64_t width) {
  return s.Ho() * s.Wo() * b.R * b.S * (s.C + s.C_out) * width;
}
template <class T>
int64_t cost_of(const BottleneckArguments<T>& b, const Shape& s, int64_t width) {
  return (s.H * s.W * s.C +
          s.Ho() * s.Wo() * (b.R * b.S * (b.cardinality == 1 ? width : b.M / b.cardinality) + s.C_out)) *
         width;
}

// The block over some instances: maps of all, a route of these. `out` holds the shortcut, and may be `x`.
template <class Block, class T>
void run_one(Block b, const Shape& s, int64_t B, const T* x, T* out, const Selections& route) {
  b.B = B, b.H = s.H, b.W = s.W, b.Ho = s.Ho(), b.Wo = s.Wo(), b.route = route;
  b.x = x, b.shortcut = b.out = out;
  if constexpr (std::is_same_v<Block, ResidualBlock<T>>)
    dynamic_residual(b);
  else
    dynamic_bottleneck(b);
}

// Instances sorted by level, the highest first, and where each level begins: what a plan says of a block.
struct Sorted {
  std::vector<int32_t> order, offsets;
  Selections route(int64_t G) const { return {G + 1, G, order.data(), offsets.data(), nullptr}; }

  Sorted(const int32_t* levels, const int32_t* instances, int64_t count, int64_t G) : order(count), offsets(G + 2) {
    for (int64_t i = 0; i < count; ++i) ++offsets[G - levels[instances[i]] + 1];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[next[G - levels[instances[i]]]++] = instances[i];
  }
  bool idle() const { return offsets.end()[-2] == 0; }  // true where all instances are at level 0
};

// A trunk with what is known before it runs: each block's shape, map and cost a level.
template <class T>
struct TrunkCall {
  const Trunk<T>& trunk;
  std::vector<Shape> shapes;  // [N]
  std::vector<T*> maps;       // [N + 1]: what block n reads; the last: what the last writes
  std::vector<double> costs;  // [B], of an instance

  explicit TrunkCall(const Trunk<T>& t) : trunk(t), maps{t.x}, costs(t.B) {
    int64_t H = t.H, W = t.W;
    size_t made = 0;
    for (const TrunkBlock<T>& block : *t.blocks) {
      const Shape s = shape_of(block, H, W);
      maps.push_back(s.kept() ? maps.back() : t.maps[made++]);
      add_costs(block, s);
      shapes.push_back(s);
      H = s.Ho(), W = s.Wo();
    }
  }

  void add_costs(const TrunkBlock<T>& block, const Shape& s) {
    std::visit(
        [&](const auto& b) {
          std::vector<double> of_level{0};
          for (int64_t g = 0, width = 0; g < trunk.G; ++g)
            of_level.push_back(static_cast<double>(cost_of(b, s, width += b.sizes[g])));
          const int32_t* levels = trunk.levels + static_cast<int64_t>(shapes.size()) * trunk.B;
          for (int64_t i = 0; i < trunk.B; ++i) costs[i] += of_level[levels[i]];
        },
        block);
  }

  int64_t count() const { return static_cast<int64_t>(shapes.size()); }

  int64_t weight_bytes(int64_t n) const {
    const auto weights = [](const ResidualBlock<T>& b) { return b.R * b.S * b.M * (b.C + b.C_out); };
    const auto of_bottleneck = [](const BottleneckArguments<T>& b) {
      return b.M * (b.C + b.R * b.S * b.M / b.cardinality + b.C_out);
    };
    const auto& block = (*trunk.blocks)[n];
    const auto* residual = std::get_if<ResidualBlock<T>>(&block);
    return (residual ? weights(*residual) : of_bottleneck(std::get<1>(block))) * static_cast<int64_t>(sizeof(T));
  }

  // Block n over some instances.
  void block(int64_t n, const int32_t* instances, int64_t count) const {
    const Shape& s = shapes[n];
    const T* x = maps[n];
    T* out = maps[n + 1];
    if (!s.kept()) {
      const int64_t from = s.H * s.W * s.C, to = s.Ho() * s.Wo() * s.C_out;
      for (int64_t i = 0; i < count; ++i)
        pool_rows(x + instances[i] * from, out + instances[i] * to, 1, s.H, s.W, s.C, s.C_out, s.stride, dtype_of<T>);
    }
    const Sorted sorted(trunk.levels + n * trunk.B, instances, count, trunk.G);
    if (sorted.idle()) return;
    std::visit([&](const auto& b) { run_one(b, s, trunk.B, x, out, sorted.route(trunk.G)); }, (*trunk.blocks)[n]);
  }

  // Some instances through all blocks: stage by stage, few of them at a time where their maps are large.
  void chunk(const int32_t* instances, int64_t count) const {
    for (int64_t n = 0; n < this->count();) {
      const int64_t pixels = shapes[n].Ho() * shapes[n].Wo();
      int64_t end = n + 1;
      while (end < this->count() && shapes[end].Ho() * shapes[end].Wo() == pixels) ++end;
      const int64_t most = weight_bytes(end - 1) > large_weights ? stage_pixels_of_large : stage_pixels;
      const int64_t together = std::max<int64_t>(1, most / pixels);
      for (int64_t i = 0; i < count; i += together)
        for (int64_t k = n; k < end; ++k) block(k, instances + i, std::min(together, count - i));
      n = end;
    }
  }
};

// features[c] = mean over the pixels of relu(x[:, c] * scale[c] + shift[c]), NaN kept.
template <class T>
ALWAYS_INLINE void pool_features(const T* __restrict x, int64_t pixels, int64_t C, const float* __restrict scale,
                                 const float* __restrict shift, T* __restrict features) {
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < C; first += block) {
    const int64_t width = std::min(block, C - first);
    float sums[block] = {};
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t c = 0; c < width; ++c) {
        const float v = widen(x[p * C + first + c]) * scale[first + c] + shift[first + c];
        sums[c] += v < 0.f ? 0.f : v;
      }
    for (int64_t c = 0; c < width; ++c) narrow(sums[c] / static_cast<float>(pixels), features[first + c]);
  }
}
DEN_KERNELS_CLONES void features_of(const float* x, int64_t pixels, int64_t C, const float* scale, const float* shift,
                                    float* features) {
  pool_features(x, pixels, C, scale, shift, features);
}
DEN_KERNELS_CLONES void features_of(const bf16* x, int64_t pixels, int64_t C, const float* scale, const float* shift,
                                    bf16* features) {
  pool_features(x, pixels, C, scale, shift, features);
}

template <class T>
void make_features(const TrunkCall<T>& call, int64_t instance) {
  const Trunk<T>& t = call.trunk;
  if (!t.scale) return;
  const Shape& last = call.shapes.back();
  const int64_t pixels = last.Ho() * last.Wo(), C = last.C_out;
  features_of(call.maps.back() + instance * pixels * C, pixels, C, t.scale, t.shift, t.features + instance * C);
}

// Where the chunks of the instances, in their order, end: each takes half of a thread's share of the cost that is left
// at most, so that threads end together, whichever of them loses its core for a while.
std::vector<int64_t> chunk_ends(const std::vector<double>& costs, const std::vector<int32_t>& order, int64_t threads) {
  const int64_t B = static_cast<int64_t>(order.size());
  double left = std::accumulate(costs.begin(), costs.end(), 0.);
  std::vector<int64_t> ends;
  for (int64_t i = 0; i < B;) {
    const int64_t first = i, share = threads == 1 ? 1 : 2 * threads;
    double taken = 0, most = left / static_cast<double>(share);
    do taken += costs[order[i++]];
    while (i < B && i - first < most_instances && taken + costs[order[i]] <= most);
    left -= taken;
    ends.push_back(i);
  }
  return ends;
}

// This thread's parallel regions have one thread while it lives.
struct OneThread {
  const int threads = omp_get_max_threads();
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(threads); }
};

template <class T>
void run_trunk(const Trunk<T>& t) {
  const TrunkCall<T> call(t);
  const int64_t threads = omp_get_max_threads();
  std::vector<int32_t> order(t.B);
  std::iota(order.begin(), order.end(), 0);
  if (t.B < 2 * threads && threads > 1) {
    for (int64_t n = 0; n < call.count(); ++n) call.block(n, order.data(), t.B);
    for (int64_t i = 0; i < t.B; ++i) make_features(call, i);
    return;
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return call.costs[a] > call.costs[b]; });
  const std::vector<int64_t> ends = chunk_ends(call.costs, order, threads);
  Failure failure;
  share_out(static_cast<int64_t>(ends.size()), threads, [&](int64_t i) {
    const OneThread alone;  // no other helps it with the blocks of a chunk
    const int64_t first = i ? ends[i - 1] : 0;
    failure.guard([&] {
      call.chunk(order.data() + first, ends[i] - first);
      for (int64_t k = first; k < ends[i]; ++k) make_features(call, order[k]);
    });
  });
  failure.rethrow();
}

}  // namespace

void dynamic_trunk(const Trunk<float>& trunk) { run_trunk(trunk); }
void dynamic_trunk(const Trunk<bf16>& trunk) { run_trunk(trunk); }

}  // namespace den_kernels
