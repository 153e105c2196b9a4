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

// A convolution's packed weight and its bias [C_out], its ReLU, and (size, stride, padding) of the max pooling behind
// that, of size 0 for none.
struct DenseConvHandle {
  static constexpr char op[] = "dense_conv";
  pybind11::object weight, bias;
  bool half;
  DenseConv<float> floats{};
  DenseConv<bf16> halves{};

  // shape: C, C_out, R, S, stride, padding.
  DenseConvHandle(const std::array<int64_t, 6>& shape, pybind11::object packed, pybind11::object offset, bool with_relu,
                  const std::array<int64_t, 3>& pool)
      : weight(std::move(packed)), bias(std::move(offset)), half(Tensor(weight, op, "weight").is<bf16>()) {
    check(pool[0] >= 0 && pool[1] >= 1, op, "a pooling's size and stride", "at least 0 and 1", pool[pool[0] >= 0]);
    check(pool[2] >= 0 && 2 * pool[2] <= pool[0], op, "a pooling's padding", "0 to half of its size", pool[2]);
    const MaxPool made{pool[0], pool[1], pool[2]};
    half ? fill(halves, shape, with_relu, made) : fill(floats, shape, with_relu, made);
  }
  template <class T>
  void fill(DenseConv<T>& conv, const std::array<int64_t, 6>& shape, bool with_relu, const MaxPool& pool) {
    conv = conv_of<DenseConv<T>>(shape);
    conv.relu = with_relu, conv.pool = pool;
    conv.weight = Tensor(weight, op, "weight").dense<const T>({dense_packed_size(conv)});
    conv.bias = Tensor(bias, op, "bias").dense<const T>({conv.C_out});
  }
};

}  // namespace den_kernels
