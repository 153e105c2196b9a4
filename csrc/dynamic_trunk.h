// Several residual blocks, one after the other, at inference on a CPU in one call.
#pragma once

#include <cstdint>
#include <functional>
#include <variant>
#include <vector>

#include "dense_conv.h"
#include "dynamic_bottleneck.h"
#include "dynamic_residual.h"

namespace den_kernels {

// A block's weights and shape; its maps and its route are set while the trunk runs.
template <class T>
using TrunkBlock = std::variant<ResidualBlock<T>, BottleneckArguments<T>>;

// x = shortcut(x) + branch(x) for each block, shortcut being a convolution where the block has one, else pool_rows
// where it changes the shape of its map, then features[b, c] = mean over the pixels of relu(x[b, :, c] * scale[c] +
// shift[c]).
template <class T>
struct Trunk {
  const std::vector<TrunkBlock<T>>* blocks;    // N
  int64_t B, H, W;                             // sizes of x
  int64_t G;                                   // channel groups of every block
  const int32_t* levels;                       // [N, B], 0..G
  T* x;                                        // [B, H, W, C], written over
  std::vector<const DenseConv<T>*> shortcuts;  // [N], null for a block without a convolution; or none at all
  std::vector<T*> maps;                        // [B, Ho, Wo, C_out] of the blocks with `has_map`, in their order
  const float* scale;                          // [C of the last block], or null: features of its map as it is
  const float* shift;                          // [C of the last block]
  T* features;                                 // [B, C of the last block], or null
  std::function<void(const int32_t* instances, int64_t count)>
      before;  // makes x of them, on their thread; may be empty

  const DenseConv<T>* shortcut(size_t n) const { return shortcuts.empty() ? nullptr : shortcuts[n]; }
  // True for a block that writes a map of its own, not over the one that it reads.
  bool has_map(size_t n) const {
    const auto changes = [](const auto& b) { return b.stride > 1 || b.C != b.C_out; };
    return shortcut(n) || std::visit(changes, (*blocks)[n]);
  }
};

// Instances do not depend on each other: a chunk of them is one thread's work through all blocks, its maps in that
// core's cache, and chunks come from one queue, dearest first. Fewer than two instances a thread: all threads share
// each block. The result does not depend on which.
void dynamic_trunk(const Trunk<float>& trunk);
void dynamic_trunk(const Trunk<bf16>& trunk);

}  // namespace den_kernels
