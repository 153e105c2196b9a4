// The activations that the ops for inference know, by the numbers that Python gives them.
#pragma once

#include <cstdint>

namespace den_kernels {

enum class Activation : int64_t { none, relu, relu6, silu, hardswish, gelu, sigmoid, hardsigmoid };
constexpr int64_t activations = 8;

}  // namespace den_kernels
