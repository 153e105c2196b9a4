// The CUDA ops in Python: addresses, sizes and the stream.
#include "bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"
#include "cuda_ops.h"
#include "device.h"

namespace py = pybind11;

namespace den_kernels {

#ifdef DEN_KERNELS_WITH_CUDA
namespace {

Plan plan_at(uintptr_t levels, uintptr_t order, uintptr_t offsets) {
  return {reinterpret_cast<int32_t*>(levels), reinterpret_cast<int32_t*>(order), reinterpret_cast<int32_t*>(offsets)};
}

template <class T>
void bind_levels(py::module_& m, const char* name) {
  m.def(
      name,
      [](uintptr_t levels, int64_t stride_b, int64_t stride_n, int64_t B, int64_t N, int64_t G, uintptr_t out,
         uintptr_t order, uintptr_t offsets, uintptr_t stream) {
        plan_levels_cuda(reinterpret_cast<const T*>(levels), stride_b, stride_n, B, N, G, plan_at(out, order, offsets),
                         reinterpret_cast<void*>(stream));
      },
      py::arg("levels"), py::arg("stride_b"), py::arg("stride_n"), py::arg("B"), py::arg("N"), py::arg("G"),
      py::arg("out_levels"), py::arg("order"), py::arg("offsets"), py::arg("stream"));
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// sizes: B, H, W, C, Ho, Wo, C_out, M, stride. addresses: x, out, order, offsets, scale1, shift1, conv1, scale2, bias1,
// conv2, bias2. layout: the fields of FusedLayout in their order.
void fused_residual(int type, const std::array<int, 9>& sizes, const std::vector<int>& widths,
                    const std::array<uintptr_t, 11>& addresses, bool holds_shortcut, bool relu,
                    const std::array<int, 9>& layout, uintptr_t stream) {
  const char* op = "fused_residual_cuda";
  check(type >= 0 && type <= 2, op, "type", "0, 1 or 2", type);
  check(widths.size() >= 2 && widths.size() <= kFusedGroups + 1, op, "widths", "of 1..32 groups", widths.size());
  const auto& [B, H, W, C, Ho, Wo, C_out, M, stride] = sizes;
  const auto& [x, out, order, offsets, scale1, shift1, conv1, scale2, bias1, conv2, bias2] = addresses;
  const int G = static_cast<int>(widths.size()) - 1;
  FusedResidual block = {
      B,
      H,
      W,
      C,
      Ho,
      Wo,
      C_out,
      M,
      stride,
      G,
      at<void>(x),
      at<void>(out),
      at<int32_t>(order),
      at<int32_t>(offsets),
      at<float>(scale1),
      at<float>(shift1),
      at<void>(conv1),
      at<float>(scale2),
      at<float>(bias1),
      at<void>(conv2),
      at<float>(bias2),
      holds_shortcut,
      relu,
      {},
      {layout[0], layout[1], layout[2], layout[3], layout[4], layout[5], layout[6], layout[7], layout[8]}};
  std::copy(widths.begin(), widths.end(), block.widths);
  fused_residual_cuda(block, static_cast<FusedType>(type), at<void>(stream));
}

}  // namespace

void bind_cuda_ops(py::module_& m) {
  m.def("fused_residual_cuda", &fused_residual, py::arg("type"), py::arg("sizes"), py::arg("widths"),
        py::arg("addresses"), py::arg("holds_shortcut"), py::arg("relu"), py::arg("layout"), py::arg("stream"));
  m.def(
      "kernel_status_cuda",
      [](int device) {
        const KernelStatus status = kernel_status(device);
        return py::make_tuple(status.code, status.message, status.driver);
      },
      py::arg("device"), "(CUDA error or 0 where the kernels run, what it means, the driver's newest CUDA: 12040).");
  m.attr("plan_groups_cuda") = kPlanGroups;
  m.attr("plan_mask_groups_cuda") = kPlanMaskGroups;
  bind_levels<int32_t>(m, "plan_levels_int32_cuda");
  bind_levels<int64_t>(m, "plan_levels_int64_cuda");
  m.def(
      "plan_masks_cuda",
      [](uintptr_t masks, int64_t B, int64_t N, int64_t G, uintptr_t levels, uintptr_t order, uintptr_t offsets,
         uintptr_t stream) {
        plan_masks_cuda(reinterpret_cast<const uint8_t*>(masks), B, N, G, plan_at(levels, order, offsets),
                        reinterpret_cast<void*>(stream));
      },
      py::arg("masks"), py::arg("B"), py::arg("N"), py::arg("G"), py::arg("levels"), py::arg("order"),
      py::arg("offsets"), py::arg("stream"));
}
#else
void bind_cuda_ops(py::module_&) {}
#endif

}  // namespace den_kernels
