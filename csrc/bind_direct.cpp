// The direct kernels in Python: convolutions, blocks and graphs, with the handles that hold a block's weights. A handle
// is checked when it is made, keeps its tensors and is one argument of a call; the maps and the route of a call are
// checked in the call (tensor.h).
#include "bind.h"

#include <pybind11/stl.h>

#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"
#include "direct_chunks.h"
#include "dynamic_bf16.h"
#include "dynamic_bottleneck.h"
#include "dynamic_conv.h"
#include "dynamic_graph.h"
#include "dynamic_residual.h"
#include "tensor.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

using Ints = std::vector<int64_t>;
using Pair = std::array<int64_t, 2>;

// A route as Python gives it: groups, order, offsets, mask or None. Everything that a kernel indexes with is looked at.
Selections selections_of(const py::tuple& route, const char* op, int64_t B) {
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
void check_groups(const Ints& sizes, int64_t G, int64_t channels, const char* op, const char* name) {
  if (sizes.empty()) return;
  check(static_cast<int64_t>(sizes.size()) == G, op, name, "as many as the route's groups", sizes.size());
  for (const int64_t size : sizes) check(size >= 0, op, name, "sizes of channel groups", size);
  const int64_t sum = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  check(sum == channels, op, name, "groups that add up to the channels", sum);
}

// A packed weight [O, I, R, S], for convolutions over the prefixes of I that `sizes` add up to.
template <class T>
const T* packed_weight(py::handle weight, const char* op, const char* name, int64_t O, int64_t I, int64_t R, int64_t S,
                       const Ints& sizes) {
  const Tensor tensor(weight, op, name);
  if constexpr (std::is_same_v<T, float>)
    return tensor.dense<const float>({(O + 15) / 16, (I + 15) / 16, R * S, 16, 16});
  else
    return tensor.dense<const T>({packed_size_bf16(O, R, S, widths_of(sizes, I))});
}

struct Window {  // of a convolution
  Pair kernel, stride, padding, dilation;
  Ints in_sizes, out_sizes;
};

// The problem of x [B, C, H, W] and y [B, C_out, Ho, Wo]; none of its addresses but x is set.
template <class T>
ConvProblem<T> conv_problem(const Tensor& x, const Tensor& y, const py::tuple& route, const Window& w) {
  const char* op = "dynamic_conv2d";
  const T* maps = x.maps<const T>({any_size, any_size, any_size, any_size});
  const int64_t B = x.size(0), C = x.size(1);
  int64_t size[2];
  for (int i = 0; i < 2; ++i) {
    check(w.kernel[i] >= 1 && w.stride[i] >= 1 && w.padding[i] >= 0 && w.dilation[i] >= 1, op, "kernel and stride",
          "at least 1", w.kernel[i]);
    const int64_t reach = x.size(2 + i) + 2 * w.padding[i] - w.dilation[i] * (w.kernel[i] - 1) - 1;
    check(reach >= 0, op, "kernel", "no larger than the padded map", w.kernel[i]);
    size[i] = reach / w.stride[i] + 1;
  }
  y.maps<T>({B, any_size, size[0], size[1]});
  const int64_t C_out = y.size(1);
  const Selections selected = selections_of(route, op, B);
  check_groups(w.in_sizes, selected.G, C, op, "in_groups");
  check_groups(w.out_sizes, selected.G, C_out, op, "out_groups");
  return {B,
          x.size(2),
          x.size(3),
          C,
          size[0],
          size[1],
          C_out,
          w.kernel[0],
          w.kernel[1],
          {w.stride[0], w.stride[1]},
          {w.padding[0], w.padding[1]},
          {w.dilation[0], w.dilation[1]},
          selected,
          w.in_sizes,
          w.out_sizes,
          maps,
          nullptr,
          nullptr,
          nullptr};
}

// What the bfloat16 kernels ask for beyond what the float32 ones do.
void check_half(const ConvProblem<float>&) {}
void check_half(const ConvProblem<bf16>& p) {
  const char* op = "dynamic_conv2d";
  check(p.C % 16 == 0 && p.C_out % 16 == 0, op, "channels in bfloat16", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, op, "dilation in bfloat16", "1", p.dilation[0]);
}

template <class T>
void run_conv(const Tensor& x, const Tensor& out, const py::tuple& route, const Window& w, py::handle weight,
              py::handle bias) {
  const char* op = "dynamic_conv2d";
  auto problem = conv_problem<T>(x, out, route, w);
  const int64_t C = problem.C, C_out = problem.C_out;
  problem.out = static_cast<T*>(out.any_maps({any_size, any_size, any_size, any_size}));
  problem.weight = packed_weight<T>(weight, op, "weight", C_out, C, w.kernel[0], w.kernel[1], w.in_sizes);
  problem.bias = dense_or_null<const T>(bias, op, "bias", {C_out});
  check_half(problem);
  py::gil_scoped_release unlocked;
  dynamic_conv(problem);
}

template <class T>
void run_weight_gradient(const Tensor& x, const Tensor& grad, py::handle dweight, const py::tuple& route,
                         const Window& w) {
  const auto problem = conv_problem<T>(x, grad, route, w);
  check_half(problem);
  if constexpr (!std::is_same_v<T, float>)
    check(w.stride[0] == 1 && w.stride[1] == 1, "dynamic_conv2d", "stride in bfloat16", "1", w.stride[0]);
  const T* dy = static_cast<const T*>(grad.any_maps({any_size, any_size, any_size, any_size}));
  T* out = Tensor(dweight, "dynamic_conv2d", "dweight").maps<T>({problem.C_out, problem.C, w.kernel[0], w.kernel[1]});
  py::gil_scoped_release unlocked;
  dynamic_conv_weight_gradient(problem, dy, out);
}

}  // namespace

void bind_dynamic_conv(py::module_& m) {
  py::class_<Window>(m, "Window", "Kernel, stride, padding and dilation [2], and the sizes of both sides' groups.")
      .def(py::init<Pair, Pair, Pair, Pair, Ints, Ints>());
  m.def("dynamic_conv",
        [](py::handle x, py::handle out, const py::tuple& route, const Window& w, py::handle weight, py::handle bias) {
          const Tensor in(x, "dynamic_conv2d", "x"), made(out, "dynamic_conv2d", "out");
          (in.is<bf16>() ? run_conv<bf16> : run_conv<float>)(in, made, route, w, weight, bias);
        });
  m.def("dynamic_conv_weight_gradient",
        [](py::handle x, py::handle grad, py::handle dweight, const py::tuple& route, const Window& w) {
          const Tensor in(x, "dynamic_conv2d", "x"), dy(grad, "dynamic_conv2d", "grad");
          (in.is<bf16>() ? run_weight_gradient<bf16> : run_weight_gradient<float>)(in, dy, dweight, route, w);
        });
}

namespace {

// The edges of a graph and their convolutions, float32.
struct GraphHandle {
  GraphProblem graph{};
  int64_t E;
  py::list weights, biases;

  GraphHandle(int64_t states, std::vector<std::pair<int64_t, int64_t>> edges, int64_t C, const Pair& kernel,
              py::list packed, py::list offsets)
      : E(static_cast<int64_t>(edges.size())), weights(std::move(packed)), biases(std::move(offsets)) {
    const char* op = "dynamic_graph";
    graph.N = states, graph.C = C, graph.R = kernel[0], graph.S = kernel[1];
    int64_t last = 0;
    for (const auto& [from, to] : edges) {
      check(0 <= from && from < to && to < states && to >= last, op, "edges", "(i, j), i < j, in the order of j", to);
      last = to;
    }
    graph.edges = std::move(edges);
    const auto count = [&](const py::list& list) { return static_cast<int64_t>(list.size()); };
    check(count(weights) == E && count(biases) == E, op, "weights and biases", "one for each edge", count(weights));
    for (int64_t e = 0; e < E; ++e) {
      graph.weights.push_back(packed_weight<float>(weights[e], op, "weights", C, C, kernel[0], kernel[1], {}));
      graph.biases.push_back(Tensor(biases[e], op, "biases").dense<const float>({C}));
    }
  }

  void run(py::handle x, py::handle out, py::handle levels, py::handle read_in, py::handle gates,
           py::handle read_out) const {
    const char* op = "dynamic_graph";
    const Tensor maps(x, op, "x");
    GraphProblem problem = graph;
    problem.x = maps.maps<const float>({any_size, graph.C, any_size, any_size});
    problem.B = maps.size(0), problem.H = maps.size(2), problem.W = maps.size(3);
    problem.out = Tensor(out, op, "out").maps<float>({problem.B, graph.C, problem.H, problem.W});
    problem.levels = Tensor(levels, op, "levels").dense<const int32_t>({E, problem.B});
    problem.read_in = Tensor(read_in, op, "read_in").dense<const float>({problem.B, graph.N});
    problem.gates = Tensor(gates, op, "gates").dense<const float>({problem.B, E});
    problem.read_out = Tensor(read_out, op, "read_out").dense<const float>({problem.B, graph.N});
    py::gil_scoped_release unlocked;
    dynamic_graph(problem);
  }
};

}  // namespace

void bind_dynamic_graph(py::module_& m) {
  py::class_<GraphHandle>(m, "Graph", "N states, edges [E], C channels, kernel [2], E packed weights and biases [C].")
      .def(py::init<int64_t, std::vector<std::pair<int64_t, int64_t>>, int64_t, Pair, py::list, py::list>())
      .def("__call__", &GraphHandle::run,
           "x and out [B, C, H, W] channels-last, levels [E, B], read_in [B, N], gates [B, E], read_out [B, N].");
}

namespace {

// A residual block's weights.
struct ResidualHandle {
  int64_t C, M, C_out, R, S, stride;
  Ints sizes;
  bool half;  // bfloat16
  ResidualBlock<float> floats{};
  ResidualBlock<bf16> halves{};
  std::array<py::object, 7> tensors;  // scale1, shift1, conv1, scale2, bias1, conv2, bias2

  // shape: C, M, C_out, R, S, stride. conv1 and conv2 packed; of float32 also as they are, four axes, channels-last.
  ResidualHandle(const std::array<int64_t, 6>& shape, Ints groups, std::array<py::object, 7> weights)
      : C(shape[0]),
        M(shape[1]),
        C_out(shape[2]),
        R(shape[3]),
        S(shape[4]),
        stride(shape[5]),
        sizes(std::move(groups)),
        half(Tensor(weights[2], op, "conv1").is<bf16>()),
        tensors(std::move(weights)) {
    check(stride >= 1, op, "stride", "at least 1", stride);
    check(R % 2 && S % 2 && R * S <= max_taps, op, "kernel", "odd and of at most 49 taps", R * S);
    check(!sizes.empty(), op, "groups", "at least one", sizes.size());
    check_groups(sizes, static_cast<int64_t>(sizes.size()), M, op, "groups");
    half ? fill(halves) : fill(floats);
  }

  template <class T>
  void fill(ResidualBlock<T>& b) {
    const auto& [scale1, shift1, conv1, scale2, bias1, conv2, bias2] = tensors;
    b.C = C, b.C_out = C_out, b.M = M, b.R = R, b.S = S, b.stride = stride, b.sizes = sizes;
    b.scale1 = dense_or_null<const float>(scale1, op, "scale1", {C});
    b.shift1 = dense_or_null<const float>(shift1, op, "shift1", {C});
    check(!b.scale1 == !b.shift1, op, "scale1 and shift1", "both tensors or both None", "one of them");
    b.bias1 = Tensor(bias1, op, "bias1").dense<const float>({M});
    b.bias2 = dense_or_null<const float>(bias2, op, "bias2", {C_out});
    b.scale2 = nullptr, b.unpacked2 = false;
    if constexpr (std::is_same_v<T, float>) {
      const Tensor first(conv1, op, "conv1"), second(conv2, op, "conv2");
      if (first.dim() == 4) {
        b.conv1 = first.maps<const float>({M, C, R, S});
        b.scale2 = Tensor(scale2, op, "scale2").dense<const float>({M});
      }
      b.unpacked2 = second.dim() == 4;
      if (b.unpacked2) b.conv2 = second.maps<const float>({C_out, M, R, S});
    }
    if (!b.scale2) b.conv1 = packed_weight<T>(conv1, op, "conv1", M, C, R, S, {});
    if (!b.unpacked2) b.conv2 = packed_weight<T>(conv2, op, "conv2", C_out, M, R, S, sizes);
  }

  template <class T>
  void run_as(ResidualBlock<T> b, const Tensor& x, py::handle shortcut, py::handle out, const py::tuple& route) const {
    b.x = x.maps<const T>({any_size, C, any_size, any_size});
    b.B = x.size(0), b.H = x.size(2), b.W = x.size(3);
    b.Ho = (b.H + stride - 1) / stride, b.Wo = (b.W + stride - 1) / stride;
    b.shortcut = Tensor(shortcut, op, "shortcut").maps<const T>({b.B, C_out, b.Ho, b.Wo});
    b.out = Tensor(out, op, "out").maps<T>({b.B, C_out, b.Ho, b.Wo});
    b.route = selections_of(route, op, b.B);
    check(b.route.G == static_cast<int64_t>(sizes.size()), op, "route", "of the block's groups", b.route.G);
    py::gil_scoped_release unlocked;
    dynamic_residual(b);
  }

  void run(py::handle x, py::handle shortcut, py::handle out, const py::tuple& route) const {
    const Tensor maps(x, op, "x");
    half ? run_as(halves, maps, shortcut, out, route) : run_as(floats, maps, shortcut, out, route);
  }

  static constexpr char op[] = "dynamic_residual";
};

void pack(py::handle weight, py::handle scale, py::handle packed, const Ints& in_sizes) {
  const char* op = "pack_weights";
  const Tensor from(weight, op, "weight"), to(packed, op, "packed");
  from.any_maps({any_size, any_size, any_size, any_size});
  const int64_t O = from.size(0), I = from.size(1), R = from.size(2), S = from.size(3);
  const float* scales = dense_or_null<const float>(scale, op, "scale", {O});
  check_groups(in_sizes, static_cast<int64_t>(in_sizes.size()), I, op, "in_groups");
  if (from.is<bf16>()) {
    const Ints widths = widths_of(in_sizes, I);
    const bf16* in = from.maps<const bf16>({O, I, R, S});
    pack_weights_bf16(in, scales, to.dense<bf16>({packed_size_bf16(O, R, S, widths)}), O, R, S, widths);
  } else {
    const float* in = from.maps<const float>({O, I, R, S});
    pack_weights(in, scales, to.dense<float>({(O + 15) / 16, (I + 15) / 16, R * S, 16, 16}), O, R * S, I);
  }
}

// Of the transposed convolution. float32: packed; bfloat16: turned, [I, O, R, S] channels-last.
void pack_turned(py::handle weight, py::handle packed) {
  const char* op = "pack_turned_weights";
  const Tensor from(weight, op, "weight"), to(packed, op, "packed");
  from.any_maps({any_size, any_size, any_size, any_size});
  const int64_t O = from.size(0), I = from.size(1), R = from.size(2), S = from.size(3);
  if (from.is<bf16>()) {
    turn_weights_bf16(from.maps<const bf16>({O, I, R, S}), to.maps<bf16>({I, O, R, S}), O, R * S, I);
  } else {
    float* out = to.dense<float>({(I + 15) / 16, (O + 15) / 16, R * S, 16, 16});
    pack_turned_weights(from.maps<const float>({O, I, R, S}), out, O, R * S, I);
  }
}

}  // namespace

void bind_dynamic_residual(py::module_& m) {
  m.def("has_dynamic_residual", &has_dynamic_residual);
  m.def("has_dynamic_residual_bf16", &has_dynamic_residual_bf16);
  m.def("bf16_isa", &bf16_isa, "The instructions that bfloat16 runs with here, or an empty string.");
  m.def(
      "packed_size_bf16",
      [](int64_t O, int64_t I, int64_t R, int64_t S, const Ints& sizes) {
        return packed_size_bf16(O, R, S, widths_of(sizes, I));
      },
      "Values of a packed bfloat16 weight [O, I, R, S], for the prefixes of I that sizes add up to.");
  m.def("pack_weights", &pack, "weight [O, I, R, S] channels-last, scale [O] or None, packed, sizes of I's groups.");
  m.def("pack_turned_weights", &pack_turned, "weight [O, I, R, S] channels-last; packed, or of bfloat16 turned.");
  py::class_<ResidualHandle>(m, "ResidualBlock",
                             "(C, M, C_out, R, S, stride), sizes of the hidden groups, (scale1, shift1, conv1, scale2, "
                             "bias1, conv2, bias2)")
      .def(py::init<std::array<int64_t, 6>, Ints, std::array<py::object, 7>>())
      .def("__call__", &ResidualHandle::run,
           "out = shortcut + branch(x): x [B, C, H, W], shortcut and out [B, C_out, Ho, Wo], channels-last; a route.");
}

namespace {

// A bottleneck block's weights.
struct BottleneckHandle {
  int64_t C, M, C_out, R, S, stride, cardinality;
  Ints sizes;
  bool half;
  BottleneckProblem<float> floats{};
  BottleneckProblem<bf16> halves{};
  std::array<py::object, 7> tensors;  // scale1, shift1, conv1, bias1, conv2, bias2, conv3

  // shape: C, M, C_out, R, S, stride, cardinality.
  BottleneckHandle(const std::array<int64_t, 7>& shape, Ints groups, std::array<py::object, 7> weights)
      : C(shape[0]),
        M(shape[1]),
        C_out(shape[2]),
        R(shape[3]),
        S(shape[4]),
        stride(shape[5]),
        cardinality(shape[6]),
        sizes(std::move(groups)),
        half(Tensor(weights[2], op, "conv1").is<bf16>()),
        tensors(std::move(weights)) {
    check(stride >= 1, op, "stride", "at least 1", stride);
    check(R % 2 && S % 2 && R * S <= max_taps, op, "kernel", "odd and of at most 49 taps", R * S);
    check(cardinality >= 1 && M % cardinality == 0, op, "cardinality", "a divisor of the hidden channels", cardinality);
    check(!sizes.empty(), op, "groups", "at least one", sizes.size());
    check_groups(sizes, static_cast<int64_t>(sizes.size()), M, op, "groups");
    for (const int64_t size : sizes)
      check(size % (M / cardinality) == 0 || cardinality == 1, op, "groups", "whole cardinality groups", size);
    half ? fill(halves) : fill(floats);
  }

  template <class T>
  void fill(BottleneckProblem<T>& b) {
    const auto& [scale1, shift1, conv1, bias1, conv2, bias2, conv3] = tensors;
    const Ints prefixes = cardinality == 1 ? sizes : Ints();
    b.C = C, b.M = M, b.C_out = C_out, b.R = R, b.S = S, b.stride = stride, b.cardinality = cardinality;
    b.sizes = sizes;
    b.scale1 = dense_or_null<const float>(scale1, op, "scale1", {C});
    b.shift1 = dense_or_null<const float>(shift1, op, "shift1", {C});
    check(!b.scale1 == !b.shift1, op, "scale1 and shift1", "both tensors or both None", "one of them");
    b.bias1 = Tensor(bias1, op, "bias1").dense<const float>({M});
    b.bias2 = Tensor(bias2, op, "bias2").dense<const float>({M});
    b.conv1 = packed_weight<T>(conv1, op, "conv1", M, C, 1, 1, {});
    b.conv2 = packed_weight<T>(conv2, op, "conv2", M, M / cardinality, R, S, prefixes);
    b.conv3 = packed_weight<T>(conv3, op, "conv3", C_out, M, 1, 1, prefixes);
  }

  template <class T>
  void run_as(BottleneckProblem<T> b, const Tensor& x, py::handle out, const py::tuple& route) const {
    b.x = x.maps<const T>({any_size, C, any_size, any_size});
    b.B = x.size(0), b.H = x.size(2), b.W = x.size(3);
    b.out = Tensor(out, op, "out").maps<T>({b.B, C_out, b.Ho(), b.Wo()});
    b.route = selections_of(route, op, b.B);
    check(b.route.G == static_cast<int64_t>(sizes.size()), op, "route", "of the block's groups", b.route.G);
    py::gil_scoped_release unlocked;
    dynamic_bottleneck(b);
  }

  void run(py::handle x, py::handle out, const py::tuple& route) const {
    const Tensor maps(x, op, "x");
    half ? run_as(halves, maps, out, route) : run_as(floats, maps, out, route);
  }

  static constexpr char op[] = "dynamic_bottleneck";
};

}  // namespace

void bind_dynamic_bottleneck(py::module_& m) {
  py::class_<BottleneckHandle>(m, "BottleneckBlock",
                               "(C, M, C_out, R, S, stride, cardinality), sizes of the hidden groups, (scale1, shift1, "
                               "conv1, bias1, conv2, bias2, conv3)")
      .def(py::init<std::array<int64_t, 7>, Ints, std::array<py::object, 7>>())
      .def("__call__", &BottleneckHandle::run,
           "out += branch(x): x [B, C, H, W], out [B, C_out, Ho, Wo], channels-last; a route.");
}

}  // namespace den_kernels
