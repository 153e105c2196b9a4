// The direct residual and bottleneck blocks in Python, as handles that hold a block's weights (see bind_direct.cpp),
// and the packing of weights.
#include "bind.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "bind_operands.h"
#include "bind_trunk.h"
#include "direct_chunks.h"
#include "dynamic_bottleneck.h"
#include "dynamic_float32.h"
#include "dynamic_residual.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

// A block's weights as Python holds them, and the two sets of arguments of which the dtype of conv1 sets one. A
// `Handle` has fill(arguments), which sets the addresses of the rest of the weights, and compute(arguments).
template <class Handle, template <class> class Arguments, size_t count>
struct BlockHandle {
  int64_t C, M, C_out, R, S, stride;
  Ints sizes;
  bool half;  // bfloat16
  bool relu;
  Arguments<float> floats{};
  Arguments<bf16> halves{};
  std::array<py::object, count> tensors;  // scale1, shift1, conv1 and the others

  // shape: C, M, C_out, R, S, stride.
  BlockHandle(const int64_t* shape, Ints groups, std::array<py::object, count> weights, bool relu)
      : C(shape[0]),
        M(shape[1]),
        C_out(shape[2]),
        R(shape[3]),
        S(shape[4]),
        stride(shape[5]),
        sizes(std::move(groups)),
        half(Tensor(weights[2], Handle::op, "conv1").template is<bf16>()),
        relu(relu),
        tensors(std::move(weights)) {
    check(stride >= 1, Handle::op, "stride", "at least 1", stride);
    check(R % 2 && S % 2 && R * S <= max_taps, Handle::op, "kernel", "odd and of at most 49 taps", R * S);
    check(!sizes.empty(), Handle::op, "groups", "at least one", sizes.size());
    check_groups(sizes, static_cast<int64_t>(sizes.size()), M, Handle::op, "groups");
  }

  const Handle& self() const { return static_cast<const Handle&>(*this); }

  // Checks and fills the arguments; called by the constructor of a handle.
  void fill() { half ? fill_common(halves) : fill_common(floats); }

  template <class T>
  void fill_common(Arguments<T>& b) {
    b.C = C, b.C_out = C_out, b.M = M, b.R = R, b.S = S, b.stride = stride, b.sizes = sizes;
    b.relu = relu;
    b.scale1 = dense_or_null<const float>(tensors[0], Handle::op, "scale1", {C});
    b.shift1 = dense_or_null<const float>(tensors[1], Handle::op, "shift1", {C});
    check(!b.scale1 == !b.shift1, Handle::op, "scale1 and shift1", "both tensors or both None", "one of them");
    self().fill(b);
  }

  // Runs a copy of the arguments on the maps and the route of one call.
  template <class T>
  void run_as(Arguments<T> b, const Tensor& x, py::handle shortcut, py::handle out, const py::tuple& route) const {
    b.x = x.maps<const T>({any_size, C, any_size, any_size});
    b.B = x.size(0), b.H = x.size(2), b.W = x.size(3);
    b.Ho = (b.H + stride - 1) / stride, b.Wo = (b.W + stride - 1) / stride;
    b.shortcut = Tensor(shortcut, Handle::op, "shortcut").maps<const T>({b.B, C_out, b.Ho, b.Wo});
    b.out = Tensor(out, Handle::op, "out").maps<T>({b.B, C_out, b.Ho, b.Wo});
    b.route = selections_of(route, Handle::op, b.B);
    check(b.route.G == static_cast<int64_t>(sizes.size()), Handle::op, "route", "of the block's groups", b.route.G);
    py::gil_scoped_release unlocked;
    Handle::compute(b);
  }

  void call(py::handle x, py::handle shortcut, py::handle out, const py::tuple& route) const {
    const Tensor input(x, Handle::op, "x");
    half ? run_as(halves, input, shortcut, out, route) : run_as(floats, input, shortcut, out, route);
  }
};

// Tensors: scale1, shift1, conv1, scale2, bias1, conv2, bias2; conv1 and conv2 packed, or as they are, four axes,
// channels-last: of float32, and of bfloat16 where dot products of pairs of input channels take them.
struct ResidualHandle : BlockHandle<ResidualHandle, ResidualBlock, 7> {
  static constexpr char op[] = "dynamic_residual";

  // shape: C, M, C_out, R, S, stride.
  ResidualHandle(const std::array<int64_t, 6>& shape, Ints groups, std::array<py::object, 7> weights, bool relu)
      : BlockHandle(shape.data(), std::move(groups), std::move(weights), relu) {
    BlockHandle::fill();
  }

  template <class T>
  void fill(ResidualBlock<T>& b) const {
    const py::object &conv1 = tensors[2], &scale2 = tensors[3], &bias1 = tensors[4], &conv2 = tensors[5];
    b.bias1 = Tensor(bias1, op, "bias1").dense<const float>({M});
    b.bias2 = dense_or_null<const float>(tensors[6], op, "bias2", {C_out});
    b.scale2 = nullptr, b.unpacked2 = false;
    const Tensor first(conv1, op, "conv1"), second(conv2, op, "conv2");
    const bool pairs = std::is_same_v<T, float> || (!has_amx() && M % 2 == 0);
    if (first.dim() == 4 && pairs) {
      b.conv1 = first.maps<const T>({M, C, R, S});
      b.scale2 = Tensor(scale2, op, "scale2").dense<const float>({M});
    }
    b.unpacked2 = second.dim() == 4 && pairs;
    if (b.unpacked2) b.conv2 = second.maps<const T>({C_out, M, R, S});
    if (!b.scale2) b.conv1 = packed_weight<T>(conv1, op, "conv1", M, C, R, S, {});
    if (!b.unpacked2) b.conv2 = packed_weight<T>(conv2, op, "conv2", C_out, M, R, S, sizes);
  }

  template <class T>
  static void compute(const ResidualBlock<T>& b) {
    dynamic_residual(b);
  }
};

// Tensors: scale1, shift1, conv1, bias1, conv2, bias2, conv3, bias3.
struct BottleneckHandle : BlockHandle<BottleneckHandle, BottleneckArguments, 8> {
  static constexpr char op[] = "dynamic_bottleneck";
  int64_t cardinality;

  // shape: C, M, C_out, R, S, stride, cardinality.
  BottleneckHandle(const std::array<int64_t, 7>& shape, Ints groups, std::array<py::object, 8> weights, bool relu)
      : BlockHandle(shape.data(), std::move(groups), std::move(weights), relu), cardinality(shape[6]) {
    check(cardinality >= 1 && M % cardinality == 0, op, "cardinality", "a divisor of the hidden channels", cardinality);
    for (const int64_t size : sizes)
      check(size % (M / cardinality) == 0 || cardinality == 1, op, "groups", "whole cardinality groups", size);
    BlockHandle::fill();
  }

  template <class T>
  void fill(BottleneckArguments<T>& b) const {
    const Ints prefixes = cardinality == 1 ? sizes : Ints();
    b.cardinality = cardinality;
    b.conv1 = packed_weight<T>(tensors[2], op, "conv1", M, C, 1, 1, {});
    b.bias1 = Tensor(tensors[3], op, "bias1").dense<const float>({M});
    b.conv2 = packed_weight<T>(tensors[4], op, "conv2", M, M / cardinality, R, S, prefixes);
    b.bias2 = Tensor(tensors[5], op, "bias2").dense<const float>({M});
    b.conv3 = packed_weight<T>(tensors[6], op, "conv3", C_out, M, 1, 1, prefixes);
    b.bias3 = dense_or_null<const float>(tensors[7], op, "bias3", {C_out});
  }

  template <class T>
  static void compute(const BottleneckArguments<T>& b) {
    dynamic_bottleneck(b);
  }
};

constexpr char of_call[] =
    "out = shortcut + branch(x): x [B, C, H, W], shortcut and out [B, C_out, Ho, Wo], channels-last; a route.";

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

// Weights of the transposed convolution, whose inputs are O.
void pack_turned(py::handle weight, py::handle packed, const Ints& out_sizes) {
  const char* op = "pack_turned_weights";
  const Tensor from(weight, op, "weight"), to(packed, op, "packed");
  from.any_maps({any_size, any_size, any_size, any_size});
  const int64_t O = from.size(0), I = from.size(1), R = from.size(2), S = from.size(3);
  check_groups(out_sizes, static_cast<int64_t>(out_sizes.size()), O, op, "out_groups");
  if (from.is<bf16>()) {
    const Ints widths = widths_of(out_sizes, O);
    const bf16* in = from.maps<const bf16>({O, I, R, S});
    pack_turned_weights_bf16(in, to.dense<bf16>({packed_size_bf16(I, R, S, widths)}), R, S, I, widths);
  } else {
    float* out = to.dense<float>({(I + 15) / 16, (O + 15) / 16, R * S, 16, 16});
    pack_turned_weights(from.maps<const float>({O, I, R, S}), out, O, R * S, I);
  }
}

}  // namespace

void bind_dynamic_residual(py::module_& m) {
  m.def("has_direct_float32", &has_direct_float32);
  m.def("float32_isa", &float32_isa, "The instructions that float32 runs with here, or an empty string.");
  m.def("limit_float32_isa", &limit_float32_isa,
        "Let the float32 kernels of all threads use at most \"AVX-512\", \"AVX2\" or \"\" (none) from now on.");
  m.def("has_direct_bf16", &has_direct_bf16);
  m.def("bf16_isa", &bf16_isa, "The instructions that bfloat16 runs with here, or an empty string.");
  m.def(
      "packed_size_bf16",
      [](int64_t O, int64_t I, int64_t R, int64_t S, const Ints& sizes) {
        return packed_size_bf16(O, R, S, widths_of(sizes, I));
      },
      "Values of a packed bfloat16 weight [O, I, R, S], for the prefixes of I that sizes add up to.");
  m.def("pack_weights", &pack, "weight [O, I, R, S] channels-last, scale [O] or None, packed, sizes of I's groups.");
  m.def("pack_turned_weights", &pack_turned, "weight [O, I, R, S] channels-last, packed, sizes of O's groups.");
  py::class_<ResidualHandle>(m, "ResidualBlock",
                             "(C, M, C_out, R, S, stride), sizes of the hidden groups, (scale1, shift1, conv1, scale2, "
                             "bias1, conv2, bias2), relu of the sum")
      .def(py::init<std::array<int64_t, 6>, Ints, std::array<py::object, 7>, bool>(), py::arg("shape"),
           py::arg("groups"), py::arg("weights"), py::arg("relu") = false)
      .def("__call__", &ResidualHandle::call, of_call);
}

void bind_dynamic_bottleneck(py::module_& m) {
  py::class_<BottleneckHandle>(m, "BottleneckBlock",
                               "(C, M, C_out, R, S, stride, cardinality), sizes of the hidden groups, (scale1, shift1, "
                               "conv1, bias1, conv2, bias2, conv3, bias3), relu of the sum")
      .def(py::init<std::array<int64_t, 7>, Ints, std::array<py::object, 8>, bool>(), py::arg("shape"),
           py::arg("groups"), py::arg("weights"), py::arg("relu") = false)
      .def("__call__", &BottleneckHandle::call, of_call);
}

TrunkHandle::TrunkHandle(py::list blocks, py::object norm_scale, py::object norm_shift, py::list convs)
    : handles(std::move(blocks)),
      shortcuts(std::move(convs)),
      scale(std::move(norm_scale)),
      shift(std::move(norm_shift)) {
  check(!handles.empty(), op, "blocks", "at least one", 0);
  for (const py::handle& each : handles) {
    if (py::isinstance<ResidualHandle>(each)) {
      add(each.cast<const ResidualHandle&>());
    } else {
      check(py::isinstance<BottleneckHandle>(each), op, "blocks", "residual blocks or bottlenecks",
            py::str(py::type::of(each)).cast<std::string>());
      add(each.cast<const BottleneckHandle&>());
    }
  }
  scales = dense_or_null<const float>(scale, op, "scale", {channels});
  shifts = dense_or_null<const float>(shift, op, "shift", {channels});
  check(!scales == !shifts, op, "scale and shift", "both tensors or both None", "one of them");
  check_shortcuts();
}

template <class Handle>
void TrunkHandle::add(const Handle& block) {
  const bool first = channels == any_size;
  check(first || block.C == channels, op, "a block's input channels", "the output channels of the one before", block.C);
  check(first || block.half == half, op, "blocks", "of one dtype", block.half ? "bfloat16 and float32" : "float32");
  check(first || static_cast<int64_t>(block.sizes.size()) == G, op, "blocks", "of as many groups", block.sizes.size());
  check(block.C_out >= block.C, op, "output channels", "at least the input channels", block.C_out);
  if (first) in_channels = block.C;
  channels = block.C_out, half = block.half, G = static_cast<int64_t>(block.sizes.size());
  if (half)
    halves.emplace_back(block.halves);
  else
    floats.emplace_back(block.floats);
}

}  // namespace den_kernels
