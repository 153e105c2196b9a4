#include "dynamic_trunk.h"

#include <algorithm>
#include <numeric>

#include "instance_queue.h"
#include "numbers.h"
#include "openmp.h"
#include "pooled_head.h"
#include "rows.h"

namespace den_kernels {
namespace {

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
    Team* team = Team::current();
    if (!s.kept() && Team::place() == 0) {
      const int64_t from = s.H * s.W * s.C, to = s.Ho() * s.Wo() * s.C_out;
      for (int64_t i = 0; i < count; ++i)
        pool_rows(x + instances[i] * from, out + instances[i] * to, 1, s.H, s.W, s.C, s.C_out, s.stride, dtype_of<T>);
    }
    if (!s.kept() && team) team->wait();
    const Sorted sorted(trunk.levels + n * trunk.B, instances, count, trunk.G);
    if (sorted.idle()) return;
    std::visit([&](const auto& b) { run_one(b, s, trunk.B, x, out, sorted.route(trunk.G)); }, (*trunk.blocks)[n]);
  }

  // Some instances through all blocks, which all threads share.
  void shared(const int32_t* instances, int64_t count) const {
    if (trunk.before) trunk.before(instances, count);
    Team::run(omp_get_max_threads(), [&] {
      for (int64_t n = 0; n < this->count(); ++n) block(n, instances, count);
    });
  }

  // Some instances through all blocks: stage by stage, few of them at a time where their maps are large.
  void chunk(const int32_t* instances, int64_t count) const {
    for (int64_t n = 0; n < this->count();) {
      const int64_t pixels = shapes[n].Ho() * shapes[n].Wo();
      int64_t end = n + 1;
      while (end < this->count() && shapes[end].Ho() * shapes[end].Wo() == pixels) ++end;
      const int64_t most = weight_bytes(end - 1) > large_weights ? stage_pixels_of_large : stage_pixels;
      const int64_t together = std::max<int64_t>(1, most / pixels);
      for (int64_t i = 0; i < count; i += together) {
        const int64_t next = std::min(together, count - i);
        if (n == 0 && trunk.before) trunk.before(instances + i, next);
        for (int64_t k = n; k < end; ++k) block(k, instances + i, next);
      }
      n = end;
    }
  }
};

template <class T>
void make_features(const TrunkCall<T>& call, int64_t instance) {
  const Trunk<T>& t = call.trunk;
  if (!t.scale) return;
  const Shape& last = call.shapes.back();
  const int64_t pixels = last.Ho() * last.Wo(), C = last.C_out;
  features_of(call.maps.back() + instance * pixels * C, pixels, C, t.scale, t.shift, t.features + instance * C);
}

template <class T>
void run_trunk(const Trunk<T>& t) {
  const TrunkCall<T> call(t);
  for_chunks(call.costs, call.count(), [&](const int32_t* instances, int64_t count, bool shared) {
    shared ? call.shared(instances, count) : call.chunk(instances, count);
    for (int64_t i = 0; i < count; ++i) make_features(call, instances[i]);
  });
}

}  // namespace

void dynamic_trunk(const Trunk<float>& trunk) { run_trunk(trunk); }
void dynamic_trunk(const Trunk<bf16>& trunk) { run_trunk(trunk); }

}  // namespace den_kernels
