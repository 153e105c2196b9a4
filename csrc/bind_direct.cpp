// The direct convolutions and graphs in Python. A graph is a handle: checked when it is made, it keeps its tensors and
// is one argument of a call; the maps and the route of a call are checked in the call (tensor.h).
#include "bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <utility>

#include "bind_operands.h"
#include "dynamic_bf16.h"
#include "dynamic_conv.h"
#include "dynamic_float32.h"
#include "dynamic_graph.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

struct Window {  // settings of a convolution: all but its tensors
  Pair kernel, stride, padding, dilation;
  Ints in_sizes, out_sizes;
};

// The arguments of x [B, C, H, W] and an output [B, C_out, size]; of its addresses x is set.
template <class T>
ConvArguments<T> map_arguments(const Tensor& x, int64_t C_out, const Pair& size, const py::tuple& route,
                               const Window& w) {
  const char* op = "dynamic_conv2d";
  for (int i = 0; i < 2; ++i)
    check(w.kernel[i] >= 1 && w.stride[i] >= 1 && w.padding[i] >= 0 && w.dilation[i] >= 1, op, "kernel and stride",
          "at least 1", w.kernel[i]);
  ConvArguments<T> made{};
  made.x = x.maps<const T>({any_size, any_size, any_size, any_size});
  made.B = x.size(0), made.C = x.size(1), made.H = x.size(2), made.W = x.size(3);
  made.Ho = size[0], made.Wo = size[1], made.C_out = C_out;
  made.R = w.kernel[0], made.S = w.kernel[1];
  for (int i = 0; i < 2; ++i)
    made.stride[i] = w.stride[i], made.padding[i] = w.padding[i], made.dilation[i] = w.dilation[i];
  made.route = selections_of(route, op, made.B);
  check_groups(w.in_sizes, made.route.G, made.C, op, "in_groups");
  check_groups(w.out_sizes, made.route.G, C_out, op, "out_groups");
  made.in_sizes = w.in_sizes, made.out_sizes = w.out_sizes;
  made.write_whole_map();
  return made;
}

// The arguments of x [B, C, H, W] and the whole output y [B, C_out, Ho, Wo]; of their addresses x is set.
template <class T>
ConvArguments<T> conv_arguments(const Tensor& x, const Tensor& y, const py::tuple& route, const Window& w) {
  const char* op = "dynamic_conv2d";
  x.maps<const T>({any_size, any_size, any_size, any_size});
  Pair size;
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = x.size(2 + i) + 2 * w.padding[i] - w.dilation[i] * (w.kernel[i] - 1) - 1;
    check(w.stride[i] >= 1, op, "stride", "at least 1", w.stride[i]);
    check(reach >= 0, op, "kernel", "no larger than the padded map", w.kernel[i]);
    size[i] = reach / w.stride[i] + 1;
  }
  y.maps<T>({x.size(0), any_size, size[0], size[1]});
  return map_arguments<T>(x, y.size(1), size, route, w);
}

// Checks of what the bfloat16 kernels need beyond what the float32 ones do.
void check_half(const ConvArguments<float>&) {}
void check_half(const ConvArguments<bf16>& p) {
  const char* op = "dynamic_conv2d";
  check(p.C % 16 == 0 && p.C_out % 16 == 0, op, "channels in bfloat16", "divisible by 16", p.C % 16 ? p.C : p.C_out);
  check(p.dilation[0] == 1 && p.dilation[1] == 1, op, "dilation in bfloat16", "1", p.dilation[0]);
}

template <class T>
void run_conv(const Tensor& x, const Tensor& out, const py::tuple& route, const Window& w, py::handle weight,
              py::handle bias) {
  const char* op = "dynamic_conv2d";
  auto arguments = conv_arguments<T>(x, out, route, w);
  const int64_t C = arguments.C, C_out = arguments.C_out;
  arguments.out = static_cast<T*>(out.any_maps({any_size, any_size, any_size, any_size}));
  arguments.weight = packed_weight<T>(weight, op, "weight", C_out, C, w.kernel[0], w.kernel[1], w.in_sizes);
  arguments.bias = dense_or_null<const T>(bias, op, "bias", {C_out});
  check_half(arguments);
  py::gil_scoped_release unlocked;
  dynamic_conv(arguments);
}

// The pixels first + step * n of dx [B, C_out, H, W] alone, over as many rows and columns of x and zeros around it as
// that takes.
template <class T>
void run_conv_phase(const Tensor& x, const Tensor& dx, const py::tuple& route, const Window& w, py::handle weight,
                    const Pair& first, const Pair& step) {
  const char* op = "dynamic_conv2d";
  x.maps<const T>({any_size, any_size, any_size, any_size});
  T* out = dx.maps<T>({x.size(0), any_size, any_size, any_size});
  check(!has_amx() || std::is_same_v<T, float>, op, "phases in bfloat16", "on a CPU without AMX", 1);
  Pair size;
  for (int i = 0; i < 2; ++i) {
    check(step[i] >= 1 && first[i] >= 0 && first[i] < dx.size(2 + i), op, "phase", "a pixel of dx", first[i]);
    size[i] = (dx.size(2 + i) - first[i] + step[i] - 1) / step[i];
  }
  auto arguments = map_arguments<T>(x, dx.size(1), size, route, w);
  const int64_t C = arguments.C, C_out = arguments.C_out, W = dx.size(3);
  arguments.out = out + (first[0] * W + first[1]) * C_out;
  arguments.pixel = step[1] * C_out, arguments.row = step[0] * W * C_out, arguments.instance = dx.size(2) * W * C_out;
  arguments.weight = packed_weight<T>(weight, op, "weight", C_out, C, w.kernel[0], w.kernel[1], w.in_sizes);
  check_half(arguments);
  py::gil_scoped_release unlocked;
  dynamic_conv(arguments);
}

template <class T>
void run_weight_gradient(const Tensor& x, const Tensor& grad, py::handle dweight, const py::tuple& route,
                         const Window& w) {
  const auto arguments = conv_arguments<T>(x, grad, route, w);
  check_half(arguments);
  if constexpr (!std::is_same_v<T, float>)
    check(!has_amx() || (w.stride[0] == 1 && w.stride[1] == 1), "dynamic_conv2d", "stride in bfloat16 with AMX", "1",
          w.stride[0]);
  const T* dy = static_cast<const T*>(grad.any_maps({any_size, any_size, any_size, any_size}));
  T* out =
      Tensor(dweight, "dynamic_conv2d", "dweight").maps<T>({arguments.C_out, arguments.C, w.kernel[0], w.kernel[1]});
  py::gil_scoped_release unlocked;
  dynamic_conv_weight_gradient(arguments, dy, out);
}

// True where torch takes maps [B, C, H, W] for channels-last by their strides, which axes of one element leave open.
bool is_channels_last(const dlpack::View& maps) {
  int64_t least = 0;
  for (const int axis : {1, 3, 2, 0}) {
    const int64_t size = maps.sizes[axis], stride = maps.strides[axis];
    if (size == 0 || maps.strides[1] == 0 || stride < least || (axis == 0 && least == maps.strides[1])) return false;
    least = stride * size;
  }
  return true;
}

// A layer's convolution with its packed weight, for calls that find it ready.
class Convolution {
 public:
  Convolution(const Window& window, py::object weight, int64_t C_out, int64_t C)
      : window_(window), weight_(std::move(weight)), C_out_(C_out), C_(C) {
    const char* op = "dynamic_conv2d";
    const Tensor packed(weight_, op, "weight");
    bf16_ = packed.is<bf16>();
    const Pair& kernel = window_.kernel;
    check(kernel[0] >= 1 && kernel[1] >= 1, op, "kernel", "at least 1", kernel[0]);
    if (bf16_)
      packed_weight<bf16>(weight_, op, "weight", C_out_, C_, kernel[0], kernel[1], window_.in_sizes);
    else
      packed_weight<float>(weight_, op, "weight", C_out_, C_, kernel[0], kernel[1], window_.in_sizes);
  }

  // The result in memory of its own; None where this is not how `dynamic_conv2d` computes it, or the operands do not
  // fit each other.
  py::object operator()(py::handle x, const py::tuple& route, py::handle bias) const {
    const char* op = "dynamic_conv2d";
    const Tensor in(x, op, "x");
    if (!takes(in, route) || !(bf16_ ? has_direct_bf16() : has_direct_float32())) return py::none();
    if (!bias.is_none() && !Tensor(bias, op, "bias").lies(false)) return py::none();
    int64_t size[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t reach = window_.dilation[i] * (window_.kernel[i] - 1) + 1;
      if (in.size(2 + i) + 2 * window_.padding[i] < reach) return py::none();
      size[i] = (in.size(2 + i) + 2 * window_.padding[i] - reach) / window_.stride[i] + 1;
    }
    const py::object out = x.attr("new_empty")(in.size(0), size[0], size[1], C_out_).attr("permute")(0, 3, 1, 2);
    const Tensor made(out, op, "out");
    (bf16_ ? run_conv<bf16> : run_conv<float>)(in, made, route, window_, weight_, bias);
    return out;
  }

 private:
  // Maps of its type and channels, and a selection of them that does not hold every instance at the highest level.
  bool takes(const Tensor& x, const py::tuple& route) const {
    if (x.dim() != 4 || x.size(1) != C_ || !(bf16_ ? x.is<bf16>() : x.is<float>())) return false;
    if (!x.lies(true) || !is_channels_last(x.view())) return false;
    const bool one_tap = window_.kernel[0] * window_.kernel[1] == 1;
    if (one_tap && x.size(2) * x.size(3) == 1) return false;
    const Tensor order(route[1], "dynamic_conv2d", "route.order"), ends(route[2], "dynamic_conv2d", "route.offsets");
    const size_t groups = std::max(window_.in_sizes.size(), window_.out_sizes.size());
    if (route[0].cast<size_t>() != groups || order.dim() != 1 || order.size(0) != x.size(0)) return false;
    return !route[3].is_none() || (ends.count() > 1 && ends.dense<const int32_t>({any_size})[1] != x.size(0));
  }

  Window window_;
  py::object weight_;
  int64_t C_out_, C_;
  bool bf16_;
};

}  // namespace

void bind_dynamic_conv(py::module_& m) {
  py::class_<Window>(m, "Window", "Kernel, stride, padding and dilation [2], and the sizes of both sides' groups.")
      .def(py::init<Pair, Pair, Pair, Pair, Ints, Ints>());
  py::class_<Convolution>(m, "Convolution", "A window, a packed weight, C_out and C.")
      .def(py::init<const Window&, py::object, int64_t, int64_t>())
      .def("__call__", &Convolution::operator(), "x [B, C, H, W], a route, a bias or None: the result, or None.");
  m.def("dynamic_conv",
        [](py::handle x, py::handle out, const py::tuple& route, const Window& w, py::handle weight, py::handle bias) {
          const Tensor in(x, "dynamic_conv2d", "x"), made(out, "dynamic_conv2d", "out");
          (in.is<bf16>() ? run_conv<bf16> : run_conv<float>)(in, made, route, w, weight, bias);
        });
  m.def("dynamic_conv_phase", [](py::handle x, py::handle dx, const py::tuple& route, const Window& w,
                                 py::handle weight, const Pair& first, const Pair& step) {
    const Tensor in(x, "dynamic_conv2d", "x"), made(dx, "dynamic_conv2d", "dx");
    (in.is<bf16>() ? run_conv_phase<bf16> : run_conv_phase<float>)(in, made, route, w, weight, first, step);
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
  GraphArguments graph{};
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
    GraphArguments arguments = graph;
    arguments.x = maps.maps<const float>({any_size, graph.C, any_size, any_size});
    arguments.B = maps.size(0), arguments.H = maps.size(2), arguments.W = maps.size(3);
    arguments.out = Tensor(out, op, "out").maps<float>({arguments.B, graph.C, arguments.H, arguments.W});
    arguments.levels = Tensor(levels, op, "levels").dense<const int32_t>({E, arguments.B});
    arguments.read_in = Tensor(read_in, op, "read_in").dense<const float>({arguments.B, graph.N});
    arguments.gates = Tensor(gates, op, "gates").dense<const float>({arguments.B, E});
    arguments.read_out = Tensor(read_out, op, "read_out").dense<const float>({arguments.B, graph.N});
    py::gil_scoped_release unlocked;
    dynamic_graph(arguments);
  }
};

}  // namespace

void bind_dynamic_graph(py::module_& m) {
  py::class_<GraphHandle>(m, "Graph", "N states, edges [E], C channels, kernel [2], E packed weights and biases [C].")
      .def(py::init<int64_t, std::vector<std::pair<int64_t, int64_t>>, int64_t, Pair, py::list, py::list>())
      .def("__call__", &GraphHandle::run,
           "x and out [B, C, H, W] channels-last, levels [E, B], read_in [B, N], gates [B, E], read_out [B, N].");
}

}  // namespace den_kernels
