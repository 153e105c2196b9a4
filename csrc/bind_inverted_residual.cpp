// The direct inverted residual block in Python, as a handle that holds a block's weights (see bind_direct.cpp).
#include "bind.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bind_operands.h"
#include "direct_chunks.h"
#include "dynamic_inverted_residual.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

// A block's weights as Python holds them, and the arguments that they fill.
struct InvertedHandle {
  static constexpr char op[] = "dynamic_inverted_residual";
  std::array<py::object, 10> tensors;
  InvertedResidual block{};

  // shape: C, M, C_out, R, S, stride, Q. Tensors: conv1 or None, bias1 or None, conv2 or None, bias2 or None, conv3,
  // bias3 or None, squeeze, squeeze_bias, excite, excite_bias, these four None where Q is 0. activations: of the hidden
  // maps, of the squeezed channels, of the gates.
  InvertedHandle(const std::array<int64_t, 7>& shape, Ints groups, std::array<py::object, 10> weights,
                 const std::array<int64_t, 3>& activation)
      : tensors(std::move(weights)) {
    InvertedResidual& b = block;
    b.C = shape[0], b.M = shape[1], b.C_out = shape[2], b.R = shape[3], b.S = shape[4], b.stride = shape[5];
    b.Q = shape[6], b.sizes = std::move(groups);
    check(b.stride >= 1, op, "stride", "at least 1", b.stride);
    check(b.R > 0 && b.S > 0 && b.R % 2 && b.S % 2 && b.R * b.S <= max_taps, op, "kernel", "odd and of at most 49 taps",
          b.R * b.S);
    check(b.Q >= 0, op, "squeezed channels", "at least 0", b.Q);
    check(!b.sizes.empty(), op, "groups", "at least one", b.sizes.size());
    check_groups(b.sizes, static_cast<int64_t>(b.sizes.size()), b.M, op, "groups");
    for (const int64_t each : activation)
      check(each >= 0 && each < activations, op, "activation", "one that is known", each);
    b.activation = static_cast<Activation>(activation[0]);
    b.squeeze_activation = static_cast<Activation>(activation[1]);
    b.gate_activation = static_cast<Activation>(activation[2]);
    fill();
  }

  void fill() {
    InvertedResidual& b = block;
    const bool expands = !tensors[0].is_none(), filters = !tensors[2].is_none();
    check(expands || b.M == b.C, op, "conv1", "a tensor where hidden channels are not the input's", "None");
    check(expands || filters, op, "conv1 and conv2", "a tensor at least of one", "None of both");
    check(filters || (b.R == 1 && b.S == 1 && b.stride == 1 && !b.Q), op, "conv2",
          "a tensor of a block with a kernel, a stride or gates", "None");
    if (expands) {
      b.conv1 = packed_weight<float>(tensors[0], op, "conv1", b.M, b.C, 1, 1, {});
      b.bias1 = Tensor(tensors[1], op, "bias1").dense<const float>({b.M});
    }
    if (filters) {
      b.conv2 = Tensor(tensors[2], op, "conv2").dense<const float>({(b.M + 15) / 16, b.R * b.S, 16});
      b.bias2 = Tensor(tensors[3], op, "bias2").dense<const float>({b.M});
    }
    b.conv3 = packed_weight<float>(tensors[4], op, "conv3", b.C_out, b.M, 1, 1, {});
    b.bias3 = dense_or_null<const float>(tensors[5], op, "bias3", {b.C_out});
    if (!b.Q) return;
    b.squeeze = packed_weight<float>(tensors[6], op, "squeeze", b.Q, b.M, 1, 1, {});
    b.squeeze_bias = Tensor(tensors[7], op, "squeeze_bias").dense<const float>({b.Q});
    b.excite = packed_weight<float>(tensors[8], op, "excite", b.M, b.Q, 1, 1, {});
    b.excite_bias = Tensor(tensors[9], op, "excite_bias").dense<const float>({b.M});
  }

  // Runs a copy of the arguments on the maps and the route of one call; shortcut None: 0.
  void call(py::handle x, py::handle shortcut, py::handle out, const py::tuple& route) const {
    InvertedResidual b = block;
    const Tensor input(x, op, "x");
    b.x = input.maps<const float>({any_size, b.C, any_size, any_size});
    b.B = input.size(0), b.H = input.size(2), b.W = input.size(3);
    check(b.H > 0 && b.W > 0, op, "x", "of at least one pixel", 0);
    b.Ho = (b.H + b.stride - 1) / b.stride, b.Wo = (b.W + b.stride - 1) / b.stride;
    b.out = Tensor(out, op, "out").maps<float>({b.B, b.C_out, b.Ho, b.Wo});
    if (!shortcut.is_none())
      b.shortcut = Tensor(shortcut, op, "shortcut").maps<const float>({b.B, b.C_out, b.Ho, b.Wo});
    b.route = selections_of(route, op, b.B);
    check(b.route.G == static_cast<int64_t>(b.sizes.size()), op, "route", "of the block's groups", b.route.G);
    py::gil_scoped_release unlocked;
    dynamic_inverted_residual(b);
  }
};

}  // namespace

void bind_dynamic_inverted_residual(py::module_& m) {
  py::class_<InvertedHandle>(m, "InvertedResidualBlock",
                             "(C, M, C_out, R, S, stride, Q), sizes of the hidden groups, (conv1, bias1, conv2, bias2, "
                             "conv3, bias3, squeeze, squeeze_bias, excite, excite_bias), activations")
      .def(py::init<std::array<int64_t, 7>, Ints, std::array<py::object, 10>, std::array<int64_t, 3>>(),
           py::arg("shape"), py::arg("groups"), py::arg("weights"), py::arg("activations"))
      .def(
          "__call__", &InvertedHandle::call,
          "out = shortcut + branch(x): x [B, C, H, W], shortcut (or None: 0) and out [B, C_out, Ho, Wo], channels-last;"
          " a route.");
}

}  // namespace den_kernels
