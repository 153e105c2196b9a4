// Convolutions of all instances in Python: a handle that holds the weights.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <utility>

#include "check.h"
#include "dense_conv.h"
#include "direct_chunks.h"
#include "tensor.h"

namespace den_kernels {

template <class Conv>
Conv conv_of(const std::array<int64_t, 6>& shape) {
  Conv conv{};
  conv.C = shape[0], conv.C_out = shape[1], conv.R = shape[2], conv.S = shape[3];
  conv.stride = shape[4], conv.padding = shape[5];
  for (int i = 0; i < 5; ++i) check(shape[i] >= 1, "dense_conv", "a convolution's sizes", "at least 1", shape[i]);
  check(conv.padding >= 0, "dense_conv", "padding", "at least 0", conv.padding);
  check(conv.R * conv.S <= max_taps, "dense_conv", "kernel", "of at most 49 taps", conv.R * conv.S);
  return conv;
}

// A convolution's packed weight and its bias [C_out].
struct DenseConvHandle {
  static constexpr char op[] = "dense_conv";
  pybind11::object weight, bias;
  bool half;
  DenseConv<float> floats{};
  DenseConv<bf16> halves{};

  // shape: C, C_out, R, S, stride, padding.
  DenseConvHandle(const std::array<int64_t, 6>& shape, pybind11::object packed, pybind11::object offset, bool with_relu)
      : weight(std::move(packed)), bias(std::move(offset)), half(Tensor(weight, op, "weight").is<bf16>()) {
    half ? fill(halves, shape, with_relu) : fill(floats, shape, with_relu);
  }
  template <class T>
  void fill(DenseConv<T>& conv, const std::array<int64_t, 6>& shape, bool with_relu) {
    conv = conv_of<DenseConv<T>>(shape);
    conv.relu = with_relu;
    conv.weight = Tensor(weight, op, "weight").dense<const T>({dense_packed_size(conv)});
    conv.bias = Tensor(bias, op, "bias").dense<const T>({conv.C_out});
  }
};

}  // namespace den_kernels
