// The blocks of a trunk in Python: a handle that holds their weights.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dynamic_trunk.h"
#include "tensor.h"

namespace den_kernels {

// Blocks one after the other, and the last batch norm and mean behind them.
struct TrunkHandle {
  static constexpr char op[] = "dynamic_trunk";
  pybind11::list handles;    // ResidualHandle, BottleneckHandle: they hold the weights
  pybind11::list shortcuts;  // DenseConvHandle of each block, or None
  pybind11::object scale, shift;
  int64_t G = 0, in_channels = any_size, channels = any_size;  // channels: behind the blocks that were added
  bool half = false;
  std::vector<TrunkBlock<float>> floats;
  std::vector<TrunkBlock<bf16>> halves;
  const float *scales = nullptr, *shifts = nullptr;

  // bind_blocks.cpp. convs: of each block's shortcut, or None
  TrunkHandle(pybind11::list blocks, pybind11::object norm_scale, pybind11::object norm_shift, pybind11::list convs);
  void run(pybind11::handle x, pybind11::handle levels, const pybind11::list& maps, pybind11::handle features) const;

  template <class T>
  const std::vector<TrunkBlock<T>>& blocks() const {
    if constexpr (std::is_same_v<T, float>)
      return floats;
    else
      return halves;
  }
  // The shortcuts as a trunk has them.
  template <class T>
  std::vector<const DenseConv<T>*> convs() const;
  // True where a ReLU stands behind the last block: no value of its map is negative.
  bool ends_in_relu() const {
    const auto relu = [](const auto& b) { return b.relu; };
    return half ? std::visit(relu, halves.back()) : std::visit(relu, floats.back());
  }
  // ValueError unless each of the levels [count] is one of 0..G.
  void check_levels(const int32_t* levels, int64_t count) const;

 private:
  template <class Handle>
  void add(const Handle& block);
  void check_shortcuts() const;
  template <class T>
  void run_as(pybind11::handle x, pybind11::handle levels, const pybind11::list& maps, pybind11::handle features) const;
};

}  // namespace den_kernels
