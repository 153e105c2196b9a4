// Checks that the bindings of the direct kernels share: of routes, channel groups and packed weights.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <numeric>
#include <type_traits>
#include <vector>

#include "check.h"
#include "direct_channels.h"
#include "dynamic_bf16.h"
#include "tensor.h"

namespace den_kernels {

using Ints = std::vector<int64_t>;
using Pair = std::array<int64_t, 2>;

// A route as Python gives it: groups, order, offsets, mask or None. All values that a kernel uses as an index are
// checked.
inline Selections selections_of(const pybind11::tuple& route, const char* op, int64_t B) {
  check(route.size() == 4, op, "route", "(groups, order, offsets, mask)", route.size());
  const int64_t G = route[0].cast<int64_t>();
  const Tensor ends(route[2], op, "route.offsets");
  const int32_t* offsets = ends.dense<const int32_t>({any_size});
  const int32_t* order = Tensor(route[1], op, "route.order").dense<const int32_t>({B});
  const bool* mask = dense_or_null<const bool>(route[3], op, "route.mask", {B, G});
  const bool masks = !route[3].is_none();  // an empty one has no address
  const int64_t S = ends.size(0) - 1;
  ends.require(S == (masks ? B : G + 1), masks ? "one for each instance, and the end" : "one a level, and the end");
  bool rising = offsets[0] == 0 && offsets[S] == B;
  for (int64_t s = 0; s < S; ++s) rising &= offsets[s] <= offsets[s + 1];
  ends.require(rising, "int32, rising from 0 to the number of instances");
  for (int64_t i = 0; i < B; ++i)
    check(order[i] >= 0 && order[i] < B, op, "route.order", "instances of the batch", order[i]);
  return {S, G, order, offsets, mask};
}

// Sizes of the G channel groups of a side, which make up its channels; none where it is not elastic.
inline void check_groups(const Ints& sizes, int64_t G, int64_t channels, const char* op, const char* name) {
  if (sizes.empty()) return;
  check(static_cast<int64_t>(sizes.size()) == G, op, name, "as many as the route's groups", sizes.size());
  for (const int64_t size : sizes) check(size >= 0, op, name, "sizes of channel groups", size);
  const int64_t sum = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  check(sum == channels, op, name, "groups that add up to the channels", sum);
}

// A packed weight [O, I, R, S], for convolutions over the prefixes of I that `sizes` add up to.
template <class T>
const T* packed_weight(pybind11::handle weight, const char* op, const char* name, int64_t O, int64_t I, int64_t R,
                       int64_t S, const Ints& sizes) {
  const Tensor tensor(weight, op, name);
  if constexpr (std::is_same_v<T, float>)
    return tensor.dense<const float>({(O + 15) / 16, (I + 15) / 16, R * S, 16, 16});
  else
    return tensor.dense<const T>({packed_size_bf16(O, R, S, widths_of(sizes, I))});
}

}  // namespace den_kernels
