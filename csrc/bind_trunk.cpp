// Trunks in Python.
#include "bind_trunk.h"

#include "bind.h"
#include "check.h"

namespace py = pybind11;

namespace den_kernels {

void TrunkHandle::check_levels(const int32_t* levels, int64_t count) const {
  for (int64_t i = 0; i < count; ++i)
    check(levels[i] >= 0 && levels[i] <= G, op, "levels", "at most the groups", levels[i]);
}

template <class T>
void TrunkHandle::run_as(py::handle x, py::handle levels, const py::list& maps, py::handle features) const {
  const std::vector<TrunkBlock<T>>& blocks = this->blocks<T>();
  const Tensor input(x, op, "x");
  Trunk<T> t{};
  t.blocks = &blocks, t.G = G, t.scale = scales, t.shift = shifts;
  const auto channels_of_block = [](const auto& b) { return b.C; };
  t.x = input.maps<T>({any_size, std::visit(channels_of_block, blocks[0]), any_size, any_size});
  t.B = input.size(0), t.H = input.size(2), t.W = input.size(3);
  check(t.H > 0 && t.W > 0, op, "x", "of at least one pixel", 0);
  int64_t H = t.H, W = t.W;
  size_t made = 0;
  for (const TrunkBlock<T>& block : blocks)
    std::visit(
        [&](const auto& b) {
          H = (H + b.stride - 1) / b.stride, W = (W + b.stride - 1) / b.stride;
          if (b.stride == 1 && b.C == b.C_out) return;
          check(made < maps.size(), op, "maps", "one for each block that changes the shape", maps.size());
          t.maps.push_back(Tensor(maps[made++], op, "maps").maps<T>({t.B, b.C_out, H, W}));
        },
        block);
  check(made == maps.size(), op, "maps", "one for each block that changes the shape", maps.size());
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
  py::class_<TrunkHandle>(m, "Trunk", "Handles of N blocks; scale and shift [C] of the last batch norm, or None.")
      .def(py::init<py::list, py::object, py::object>())
      .def("__call__", &TrunkHandle::run,
           "x [B, C, H, W] channels-last, written over; levels [N, B]; the maps [B, C_out, Ho, Wo] of the blocks that "
           "change the shape; features [B, C] or None.");
}

}  // namespace den_kernels
