// The CPU ops in Python: addresses, sizes and codes in, no tensor. Only this file and the other bindings know pybind11,
// whose headers take longer to compile than an op does.
#include "bind.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "check.h"
#include "dynamic_bf16.h"
#include "dynamic_bottleneck.h"
#include "dynamic_conv.h"
#include "dynamic_graph.h"
#include "dynamic_residual.h"
#include "norm.h"
#include "norm_spans.h"
#include "plan.h"
#include "rows.h"

namespace py = pybind11;

namespace den_kernels {
namespace {

using Ints = std::vector<int64_t>;

template <class T = float>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

namespace {

template <class T>
void bind_levels(py::module_& m, const char* name) {
  m.def(
      name,
      [](uintptr_t levels, int64_t B, int64_t N, int64_t G, uintptr_t out, uintptr_t order, uintptr_t offsets) {
        const T* in = pointer<const T>(levels);
        const Plan plan = {pointer<int32_t>(out), pointer<int32_t>(order), pointer<int32_t>(offsets)};
        const int64_t bad = [&] {
          py::gil_scoped_release release;
          return plan_levels(in, B, N, G, plan);
        }();
        if (bad < 0) return;
        const std::string got =
            std::to_string(in[bad]) + " for instance " + std::to_string(bad / N) + ", block " + std::to_string(bad % N);
        check(false, "plan_levels", "levels", ("in 0.." + std::to_string(G)).c_str(), got);
      },
      py::arg("levels"), py::arg("B"), py::arg("N"), py::arg("G"), py::arg("out_levels"), py::arg("order"),
      py::arg("offsets"));
}

}  // namespace

void bind_plan(py::module_& m) {
  bind_levels<int32_t>(m, "plan_levels_int32");
  bind_levels<int64_t>(m, "plan_levels_int64");
  m.def(
      "plan_masks",
      [](uintptr_t masks, int64_t B, int64_t N, int64_t G, uintptr_t levels, uintptr_t order, uintptr_t offsets) {
        py::gil_scoped_release release;
        plan_masks(pointer<const uint8_t>(masks), B, N, G,
                   {pointer<int32_t>(levels), pointer<int32_t>(order), pointer<int32_t>(offsets)});
      },
      py::arg("masks"), py::arg("B"), py::arg("N"), py::arg("G"), py::arg("levels"), py::arg("order"),
      py::arg("offsets"));
}

void bind_rows(py::module_& m) {
  m.def("gather_rows", [](uintptr_t src, uintptr_t dst, uintptr_t order, int64_t n, int64_t P, int64_t src_stride,
                          int64_t width, int src_dtype, int dst_dtype, uintptr_t scale, uintptr_t shift, bool relu) {
    py::gil_scoped_release unlocked;
    gather_rows(pointer<const void>(src), pointer<void>(dst), pointer<const int32_t>(order), n, P, src_stride, width,
                static_cast<Dtype>(src_dtype), static_cast<Dtype>(dst_dtype), pointer<const float>(scale),
                pointer<const float>(shift), relu);
  });
  m.def("scatter_rows", [](uintptr_t src, uintptr_t dst, uintptr_t order, int64_t n, int64_t P, int64_t width,
                           int64_t dst_stride, int src_dtype, int dst_dtype, bool accumulate) {
    py::gil_scoped_release unlocked;
    scatter_rows(pointer<const void>(src), pointer<void>(dst), pointer<const int32_t>(order), n, P, width, dst_stride,
                 static_cast<Dtype>(src_dtype), static_cast<Dtype>(dst_dtype), accumulate);
  });
  m.def("pool_rows", [](uintptr_t src, uintptr_t dst, int64_t B, int64_t H, int64_t W, int64_t C, int64_t C_out,
                        int64_t stride, int dtype) {
    py::gil_scoped_release unlocked;
    pool_rows(pointer<const void>(src), pointer<void>(dst), B, H, W, C, C_out, stride, static_cast<Dtype>(dtype));
  });
}

namespace {

NormBatch make_batch(int64_t B, int64_t P, int64_t element_bytes, uintptr_t selection, const Ints& groups) {
  NormBatch batch{B, P, 0, 1, element_bytes, pointer<const uint8_t>(selection), {}};
  for (const int64_t size : groups) batch.ends.push_back(batch.C += size);
  while (2 * batch.fold * batch.C <= folded_lanes && P % (2 * batch.fold) == 0 && P > 0) batch.fold *= 2;
  return batch;
}

}  // namespace

void bind_norm(py::module_& m) {
  using Batch = const NormBatch&;
  using Affine = const NormAffine&;
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<NormBatch>(m, "NormBatch").def(py::init(&make_batch));
  py::class_<NormAffine>(m, "NormAffine")
      .def(py::init([](uintptr_t statistics, uintptr_t weight, uintptr_t bias, float eps, bool relu) {
        return NormAffine{pointer(statistics), pointer(weight), pointer(bias), eps, relu};
      }));
  m.def(
      "norm_statistics",
      [](Batch batch, uintptr_t x, uintptr_t statistics) {
        norm_statistics(batch, pointer<void>(x), pointer(statistics));
      },
      unlocked);
  m.def(
      "norm_apply",
      [](Batch batch, Affine affine, uintptr_t x, uintptr_t y) {
        norm_apply(batch, affine, pointer<void>(x), pointer<void>(y));
      },
      unlocked);
  m.def(
      "norm_reduce",
      [](Batch batch, Affine affine, uintptr_t dy, uintptr_t x, uintptr_t sums) {
        norm_reduce(batch, affine, pointer<void>(dy), pointer<void>(x), pointer(sums));
      },
      unlocked);
  m.def(
      "norm_gradient",
      [](Batch batch, Affine affine, uintptr_t dy, uintptr_t x, uintptr_t sums, uintptr_t dx) {
        norm_gradient(batch, affine, pointer<void>(dy), pointer<void>(x), pointer(sums), pointer<void>(dx));
      },
      unlocked);
}

namespace {

// A convolution without its tensors. input: [B, H, W, C]; output: [B, Ho, Wo, C_out]; the others: [2], or [G].
template <class T>
ConvProblem<T> conv_problem(const Route& route, const Ints& input, const Ints& output, const Ints& kernel,
                            const Ints& stride, const Ints& padding, const Ints& dilation, const Ints& in_sizes,
                            const Ints& out_sizes) {
  return {input[0],
          input[1],
          input[2],
          input[3],
          output[1],
          output[2],
          output[3],
          kernel[0],
          kernel[1],
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]},
          selections_of(route),
          in_sizes,
          out_sizes,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

template <class T>
void run_conv(uintptr_t x, uintptr_t out, const Route& route, const Ints& input, const Ints& output, const Ints& kernel,
              const Ints& stride, const Ints& padding, const Ints& dilation, const Ints& in_sizes,
              const Ints& out_sizes, uintptr_t weight, uintptr_t bias) {
  auto problem = conv_problem<T>(route, input, output, kernel, stride, padding, dilation, in_sizes, out_sizes);
  problem.x = pointer<const T>(x);
  problem.out = pointer<T>(out);
  problem.weight = pointer<const T>(weight);
  problem.bias = pointer<const T>(bias);
  py::gil_scoped_release unlocked;
  dynamic_conv(problem);
}

template <class T>
void run_weight_gradient(uintptr_t x, uintptr_t grad, uintptr_t dweight, const Route& route, const Ints& input,
                         const Ints& output, const Ints& kernel, const Ints& stride, const Ints& padding,
                         const Ints& dilation, const Ints& in_sizes, const Ints& out_sizes) {
  auto problem = conv_problem<T>(route, input, output, kernel, stride, padding, dilation, in_sizes, out_sizes);
  problem.x = pointer<const T>(x);
  py::gil_scoped_release unlocked;
  dynamic_conv_weight_gradient(problem, pointer<const T>(grad), pointer<T>(dweight));
}

}  // namespace

void bind_dynamic_conv(py::module_& m) {
  m.def("dynamic_conv", &run_conv<float>);
  m.def("dynamic_conv_bf16", &run_conv<bf16>);
  m.def("dynamic_conv_weight_gradient", &run_weight_gradient<float>);
  m.def("dynamic_conv_weight_gradient_bf16", &run_weight_gradient<bf16>);
}

void bind_dynamic_graph(py::module_& m) {
  using Edges = std::vector<std::pair<int64_t, int64_t>>;
  using Addresses = std::vector<uintptr_t>;
  m.def("dynamic_graph", [](uintptr_t x, uintptr_t out, uintptr_t levels, uintptr_t read_in, uintptr_t gates,
                            uintptr_t read_out, const Ints& sizes, const Ints& kernel, const Edges& edges,
                            const Addresses& weights, const Addresses& biases) {
    py::gil_scoped_release unlocked;
    const auto floats = [](uintptr_t p) { return pointer<const float>(p); };
    GraphProblem problem{sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         sizes[4],
                         kernel[0],
                         kernel[1],
                         edges,
                         pointer<const int32_t>(levels),
                         floats(read_in),
                         floats(gates),
                         floats(read_out),
                         floats(x),
                         pointer(out),
                         {},
                         {}};
    for (const uintptr_t address : weights) problem.weights.push_back(floats(address));
    for (const uintptr_t address : biases) problem.biases.push_back(floats(address));
    dynamic_graph(problem);
  });
}

namespace {

template <class T>
void run_residual(uintptr_t x, uintptr_t shortcut, uintptr_t out, const Route& route, const Ints& input, int64_t stride,
                  const Ints& weights, const Ints& sizes, uintptr_t scale1, uintptr_t shift1, uintptr_t conv1,
                  uintptr_t bias1, uintptr_t conv2, uintptr_t bias2, uintptr_t scale2, bool unpacked2) {
  const auto values = [](uintptr_t p) { return pointer<const T>(p); };
  const auto floats = [](uintptr_t p) { return pointer<const float>(p); };
  const int64_t H = input[1], W = input[2], Ho = (H + stride - 1) / stride, Wo = (W + stride - 1) / stride;
  py::gil_scoped_release unlocked;
  dynamic_residual(ResidualBlock<T>{input[0],
                                    H,
                                    W,
                                    input[3],
                                    Ho,
                                    Wo,
                                    weights[0],
                                    weights[1],
                                    weights[2],
                                    weights[3],
                                    stride,
                                    selections_of(route),
                                    sizes,
                                    values(x),
                                    values(shortcut),
                                    pointer<T>(out),
                                    floats(scale1),
                                    floats(shift1),
                                    values(conv1),
                                    floats(bias1),
                                    values(conv2),
                                    floats(bias2),
                                    floats(scale2),
                                    unpacked2});
}

constexpr char weights_and_sizes[] = "weights: [C_out, M, R, S]; input: [B, H, W, C]; sizes: [G]";

}  // namespace

void bind_dynamic_residual(py::module_& m) {
  m.def("has_dynamic_residual", &has_dynamic_residual);
  m.def("has_dynamic_residual_bf16", &has_dynamic_residual_bf16);
  m.def("bf16_isa", &bf16_isa, "The instructions that bfloat16 runs with here, or an empty string.");
  m.def("packed_size_bf16", &packed_size_bf16);
  m.def("pack_weights_bf16", [](uintptr_t weight, uintptr_t scale, uintptr_t packed, int64_t O, int64_t R, int64_t S,
                                const Ints& widths) {
    pack_weights_bf16(pointer<const bf16>(weight), pointer<const float>(scale), pointer<bf16>(packed), O, R, S, widths);
  });
  m.def("pack_weights", [](uintptr_t weight, uintptr_t scale, uintptr_t packed, int64_t O, int64_t taps, int64_t I) {
    pack_weights(pointer<const float>(weight), pointer<const float>(scale), pointer<float>(packed), O, taps, I);
  });
  m.def("turn_weights_bf16", [](uintptr_t weight, uintptr_t turned, int64_t O, int64_t taps, int64_t I) {
    turn_weights_bf16(pointer<const bf16>(weight), pointer<bf16>(turned), O, taps, I);
  });
  m.def("pack_turned_weights", [](uintptr_t weight, uintptr_t packed, int64_t O, int64_t taps, int64_t I) {
    pack_turned_weights(pointer<const float>(weight), pointer<float>(packed), O, taps, I);
  });
  m.def("dynamic_residual", &run_residual<float>, weights_and_sizes);
  m.def("dynamic_residual_bf16", &run_residual<bf16>, weights_and_sizes);
}

namespace {

template <class T>
void run_bottleneck(uintptr_t x, uintptr_t out, const Route& route, const Ints& input, const Ints& block,
                    const Ints& sizes, const std::vector<uintptr_t>& weights) {
  const auto floats = [&weights](size_t i) { return pointer<const float>(weights.at(i)); };
  const auto values = [&weights](size_t i) { return pointer<const T>(weights.at(i)); };
  BottleneckProblem<T> problem{};
  problem.B = input.at(0), problem.H = input.at(1), problem.W = input.at(2), problem.C = input.at(3);
  problem.M = block.at(0), problem.C_out = block.at(1), problem.R = block.at(2), problem.S = block.at(3);
  problem.stride = block.at(4), problem.cardinality = block.at(5);
  problem.route = selections_of(route), problem.sizes = sizes;
  problem.x = pointer<const T>(x), problem.out = pointer<T>(out);
  problem.scale1 = floats(0), problem.shift1 = floats(1), problem.bias1 = floats(3), problem.bias2 = floats(5);
  problem.conv1 = values(2), problem.conv2 = values(4), problem.conv3 = values(6);
  py::gil_scoped_release unlocked;
  dynamic_bottleneck(problem);
}

}  // namespace

void bind_dynamic_bottleneck(py::module_& m) {
  constexpr char text[] =
      "input: [B, H, W, C]; block: [M, C_out, R, S, stride, cardinality]; sizes: [G]; weights: addresses of scale1, "
      "shift1, conv1, bias1, conv2, bias2, conv3";
  m.def("dynamic_bottleneck", &run_bottleneck<float>, text);
  m.def("dynamic_bottleneck_bf16", &run_bottleneck<bf16>, text);
}

}  // namespace den_kernels
