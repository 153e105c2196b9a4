// Trunks in Python.
#include "bind_trunk.h"

#include "bind.h"
#include "bind_dense_conv.h"
#include "check.h"

namespace py = pybind11;

namespace den_kernels {

void TrunkHandle::check_levels(const int32_t* levels, int64_t count) const {
  for (int64_t i = 0; i < count; ++i)
    check(levels[i] >= 0 && levels[i] <= G, op, "levels", "at most the groups", levels[i]);
}

template <class T>
std::vector<const DenseConv<T>*> TrunkHandle::convs() const {
  std::vector<const DenseConv<T>*> found;
  for (const py::handle& each : shortcuts)
    if (each.is_none())
      found.push_back(nullptr);
    else if constexpr (std::is_same_v<T, float>)
      found.push_back(&each.cast<const DenseConvHandle&>().floats);
    else
      found.push_back(&each.cast<const DenseConvHandle&>().halves);
  return found;
}
template std::vector<const DenseConv<float>*> TrunkHandle::convs() const;
template std::vector<const DenseConv<bf16>*> TrunkHandle::convs() const;

void TrunkHandle::check_shortcuts() const {
  if (shortcuts.empty()) return;
  check(shortcuts.size() == handles.size(), op, "shortcuts", "one for each block, or None", shortcuts.size());
  for (size_t n = 0; n < shortcuts.size(); ++n) {
    if (shortcuts[n].is_none()) continue;
    const auto& conv = shortcuts[n].cast<const DenseConvHandle&>();
    check(conv.half == half, op, "shortcuts", "of the blocks' dtype", conv.half ? "bfloat16" : "float32");
    const auto fits = [](const auto& c, const auto& b) {
      const bool same = (c.R - 1) / 2 == c.padding && c.R % 2 && c.R == c.S && c.stride == b.stride;
      return same && c.C == b.C && c.C_out == b.C_out && !c.pool.size;
    };
    const bool whole = half ? std::visit([&](const auto& b) { return fits(conv.halves, b); }, halves[n])
                            : std::visit([&](const auto& b) { return fits(conv.floats, b); }, floats[n]);
    check(whole, op, "shortcuts", "of their blocks' channels and stride, with \"same\" padding", "another");
  }
}

template <class T>
void TrunkHandle::run_as(py::handle x, py::handle levels, const py::list& maps, py::handle features) const {
  const std::vector<TrunkBlock<T>>& blocks = this->blocks<T>();
  const Tensor input(x, op, "x");
  Trunk<T> t{};
  t.blocks = &blocks, t.G = G, t.scale = scales, t.shift = shifts, t.shortcuts = convs<T>();
  const auto channels_of_block = [](const auto& b) { return b.C; };
  t.x = input.maps<T>({any_size, std::visit(channels_of_block, blocks[0]), any_size, any_size});
  t.B = input.size(0), t.H = input.size(2), t.W = input.size(3);
  check(t.H > 0 && t.W > 0, op, "x", "of at least one pixel", 0);
  int64_t H = t.H, W = t.W;
  size_t made = 0;
  constexpr char wanted[] = "one for each block that changes the shape, or has a convolution as its shortcut";
  for (size_t n = 0; n < blocks.size(); ++n)
    std::visit(
        [&](const auto& b) {
          H = (H + b.stride - 1) / b.stride, W = (W + b.stride - 1) / b.stride;
          if (!t.has_map(n)) return;
          check(made < maps.size(), op, "maps", wanted, maps.size());
          t.maps.push_back(Tensor(maps[made++], op, "maps").maps<T>({t.B, b.C_out, H, W}));
        },
        blocks[n]);
  check(made == maps.size(), op, "maps", wanted, maps.size());
  const int64_t N = static_cast<int64_t>(blocks.size());
  t.levels = Tensor(levels, op, "levels").dense<const int32_t>({N, t.B});
  check_levels(t.levels, N * t.B);
  t.features = dense_or_null<T>(features, op, "features", {t.B, channels});
  check(!t.features == !t.scale || !t.B, op, "features", "a tensor where there are scale and shift", "another");
  py::gil_scoped_release unlocked;
  dynamic_trunk(t);
}

void TrunkHandle::run(py::handle x, py::handle levels, const py::list& maps, py::handle features) const {
  half ? run_as<bf16>(x, levels, maps, features) : run_as<float>(x, levels, maps, features);
}

void bind_dynamic_trunk(py::module_& m) {
  py::class_<TrunkHandle>(m, "Trunk",
                          "Handles of N blocks; scale and shift [C] of the last batch norm, or None; DenseConv of each "
                          "block's shortcut, or None, or an empty list.")
      .def(py::init<py::list, py::object, py::object, py::list>(), py::arg("blocks"), py::arg("scale"),
           py::arg("shift"), py::arg("shortcuts") = py::list())
      .def("__call__", &TrunkHandle::run,
           "x [B, C, H, W] channels-last, written over; levels [N, B]; the maps [B, C_out, Ho, Wo] of the blocks that "
           "change the shape or have a convolution as their shortcut; features [B, C] or None.");
}

}  // namespace den_kernels
