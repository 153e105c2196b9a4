// Convolutions that all instances run in full, with bias, and a ReLU and a max pooling behind them: the layers around
// elastic blocks.
#pragma once

#include <cstdint>

#include "max_pool.h"
#include "numbers.h"

namespace den_kernels {

template <class T>
struct DenseConv {
  int64_t C, C_out, R, S, stride, padding;
  const T* weight;  // packed by pack_dense, dense_packed_size values
  const T* bias;    // [C_out]
  bool relu;        // behind it
  MaxPool pool;     // behind that

  // Side of the convolution's map, and of the output; 0 where the padded input is smaller than the kernel.
  int64_t convolved(int64_t size, int64_t kernel) const {
    return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
  }
  int64_t out(int64_t size, int64_t kernel) const { return pool.out(convolved(size, kernel)); }
  // Multiply-adds of an instance whose map behind the convolution has so many pixels.
  double cost(int64_t pixels) const { return static_cast<double>(pixels * R * S * C) * static_cast<double>(C_out); }
};

// out[i] = conv(x[i], weight) + bias, or its ReLU, and the pooling of that, for the instances i of order [count]. x:
// [., H, W, C], out: [., Ho, Wo, C_out], zero padding. Needs a direct kernel of T (has_direct_float32, has_direct_bf16)
// and at most 49 taps.
void dense_conv(const DenseConv<float>& conv, const float* x, float* out, const int32_t* order, int64_t count,
                int64_t H, int64_t W);
void dense_conv(const DenseConv<bf16>& conv, const bf16* x, bf16* out, const int32_t* order, int64_t count, int64_t H,
                int64_t W);

// The values of a packed weight [C_out, C, R, S], and its packing from [C_out, R, S, C].
int64_t dense_packed_size(const DenseConv<float>& conv);
int64_t dense_packed_size(const DenseConv<bf16>& conv);
void pack_dense(const DenseConv<float>& conv, const float* weight, float* packed);
void pack_dense(const DenseConv<bf16>& conv, const bf16* weight, bf16* packed);

}  // namespace den_kernels
