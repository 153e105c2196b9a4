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
// The last blocks, where a batch's maps have few pixels and a block's weights many bytes: small chunks would each read
// them from memory for so few pixels that the arithmetic waits. There are as many chunks of these blocks as threads.
constexpr int64_t few_pixels = 256, streamed_weights = 1 << 21;

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, float> ? Dtype::float32 : Dtype::bfloat16;

// The sizes of the map that a block reads, and its stride and output channels.
struct Shape {
  int64_t H, W, C, stride, C_out;
  int64_t Ho() const { return (H + stride - 1) / stride; }
  int64_t Wo() const { return (W + stride - 1) / stride; }
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
  int64_t users() const { return offsets.end()[-2]; }  // those above level 0, which come first
};

// A trunk with what is known before it runs: each block's shape and map.
template <class T>
struct TrunkCall {
  const Trunk<T>& trunk;
  std::vector<Shape> shapes;  // [N]
  std::vector<T*> maps;       // [N + 1]: what block n reads; the last: what the last writes
  int64_t streamed;           // the first of the last blocks, whose weights are read for few pixels

  explicit TrunkCall(const Trunk<T>& t) : trunk(t), maps{t.x} {
    int64_t H = t.H, W = t.W;
    size_t made = 0;
    for (const TrunkBlock<T>& block : *t.blocks) {
      const Shape s = shape_of(block, H, W);
      maps.push_back(t.has_map(shapes.size()) ? t.maps[made++] : maps.back());
      shapes.push_back(s);
      H = s.Ho(), W = s.Wo();
    }
    for (streamed = count(); streamed && is_streamed(streamed - 1);) --streamed;
  }

  // Multiply-adds of each instance in the blocks first .. last - 1.
  std::vector<double> costs(int64_t first, int64_t last) const {
    std::vector<double> found(static_cast<size_t>(trunk.B));
    for (int64_t n = first; n < last; ++n)
      std::visit([&](const auto& b) { add_costs(n, b, found); }, (*trunk.blocks)[n]);
    return found;
  }
  template <class Block>
  void add_costs(int64_t n, const Block& b, std::vector<double>& costs) const {
    const DenseConv<T>* shortcut = trunk.shortcut(static_cast<size_t>(n));
    std::vector<double> of_level{shortcut ? shortcut->cost(shapes[n].Ho() * shapes[n].Wo()) : 0.};
    for (int64_t g = 0, width = 0; g < trunk.G; ++g)
      of_level.push_back(of_level[0] + static_cast<double>(cost_of(b, shapes[n], width += b.sizes[g])));
    for (int64_t i = 0; i < trunk.B; ++i) costs[i] += of_level[trunk.levels[n * trunk.B + i]];
  }

  int64_t count() const { return static_cast<int64_t>(shapes.size()); }
  bool is_streamed(int64_t n) const {
    return trunk.B * shapes[n].Ho() * shapes[n].Wo() <= few_pixels && weight_bytes(n) > streamed_weights;
  }

  int64_t weight_bytes(int64_t n) const {
    const auto weights = [](const ResidualBlock<T>& b) { return b.R * b.S * b.M * (b.C + b.C_out); };
    const auto of_bottleneck = [](const BottleneckArguments<T>& b) {
      return b.M * (b.C + b.R * b.S * b.M / b.cardinality + b.C_out);
    };
    const auto& block = (*trunk.blocks)[n];
    const auto* residual = std::get_if<ResidualBlock<T>>(&block);
    return (residual ? weights(*residual) : of_bottleneck(std::get<1>(block))) * static_cast<int64_t>(sizeof(T));
  }

  // The shortcut of block n, pooled, of some instances.
  void pool(int64_t n, const int32_t* instances, int64_t count) const {
    const Shape& s = shapes[n];
    const int64_t from = s.W * s.C, to = s.Wo() * s.C_out;
    share_items(count * s.Ho(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, rows; i < end; i += rows) {
        const int64_t instance = instances[i / s.Ho()], row = i % s.Ho(), first = row * s.stride;
        rows = std::min(s.Ho() - row, end - i);
        pool_rows(maps[n] + (instance * s.H + first) * from, maps[n + 1] + (instance * s.Ho() + row) * to, 1,
                  std::min(rows * s.stride, s.H - first), s.W, s.C, s.C_out, s.stride, dtype_of<T>);
      }
    });
  }

  // The shortcut of block n, which writes a map of its own, pooled or by a convolution: of instances without a branch
  // with the ReLU behind it.
  void shortcut(int64_t n, const Sorted& sorted) const {
    const Shape& s = shapes[n];
    const int32_t* instances = sorted.order.data();
    const int64_t count = static_cast<int64_t>(sorted.order.size()), users = sorted.users();
    const DenseConv<T>* found = trunk.shortcut(static_cast<size_t>(n));
    if (!found) return pool(n, instances, count);
    DenseConv<T> conv = *found;
    conv.relu = false;
    dense_conv(conv, maps[n], maps[n + 1], instances, users, s.H, s.W);
    conv.relu = std::visit([](const auto& b) { return b.relu; }, (*trunk.blocks)[n]);
    dense_conv(conv, maps[n], maps[n + 1], instances + users, count - users, s.H, s.W);
  }

  // Block n over some instances.
  void block(int64_t n, const int32_t* instances, int64_t count) const {
    const Shape& s = shapes[n];
    const Sorted sorted(trunk.levels + n * trunk.B, instances, count, trunk.G);
    if (maps[n + 1] != maps[n]) shortcut(n, sorted);
    if (!sorted.users()) return;
    std::visit([&](const auto& b) { run_one(b, s, trunk.B, maps[n], maps[n + 1], sorted.route(trunk.G)); },
               (*trunk.blocks)[n]);
  }

  // Features of some instances.
  void features(const int32_t* instances, int64_t count) const {
    const int64_t pixels = shapes.back().Ho() * shapes.back().Wo(), C = shapes.back().C_out;
    share_items(trunk.features ? count : 0, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        features_of(maps.back() + instances[i] * pixels * C, pixels, C, trunk.scale, trunk.shift,
                    trunk.features + instances[i] * C);
    });
  }

  // Some instances through all blocks, and their features: all threads share each of them.
  void shared(const int32_t* instances, int64_t count) const {
    Team::run(omp_get_max_threads(), [&] {
      if (trunk.before) trunk.before(instances, count);
      for (int64_t n = 0; n < this->count(); ++n) block(n, instances, count);
      features(instances, count);
    });
  }

  // Some instances through the blocks first .. last - 1: stage by stage, few of them at a time where their maps are
  // large; behind the last block their features.
  void chunk(const int32_t* instances, int64_t count, int64_t first, int64_t last) const {
    for (int64_t n = first; n < last;) {
      const int64_t pixels = shapes[n].Ho() * shapes[n].Wo();
      int64_t end = n + 1;
      while (end < last && shapes[end].Ho() * shapes[end].Wo() == pixels) ++end;
      const int64_t most = weight_bytes(end - 1) > large_weights ? stage_pixels_of_large : stage_pixels;
      const int64_t together = std::max<int64_t>(1, most / pixels);
      for (int64_t i = 0; i < count; i += together) {
        const int64_t next = std::min(together, count - i);
        if (n == 0 && trunk.before) trunk.before(instances + i, next);
        for (int64_t k = n; k < end; ++k) block(k, instances + i, next);
      }
      n = end;
    }
    if (last == this->count()) features(instances, count);
  }
};

template <class T>
void run_trunk(const Trunk<T>& t) {
  const TrunkCall<T> call(t);
  const bool divides = fill_chunks(t.B, omp_get_max_threads()) && call.streamed > 0;
  const int64_t N = call.count(), last = divides ? call.streamed : N;
  for_chunks(call.costs(0, last), N, [&](const int32_t* instances, int64_t count, bool shared) {
    shared ? call.shared(instances, count) : call.chunk(instances, count, 0, last);
  });
  if (last == N) return;
  for_shares(call.costs(last, N),
             [&](const int32_t* instances, int64_t count) { call.chunk(instances, count, last, N); });
}

}  // namespace

void dynamic_trunk(const Trunk<float>& trunk) { run_trunk(trunk); }
void dynamic_trunk(const Trunk<bf16>& trunk) { run_trunk(trunk); }

}  // namespace den_kernels
