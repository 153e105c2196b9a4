#include "dense_conv.h"

#include "dynamic_bf16.h"
#include "dynamic_conv.h"
#include "instance_queue.h"

namespace den_kernels {
namespace {

// bfloat16 images have few channels, which the kernels that take 16 together do not; dot products of pairs do.
bool by_pairs(const DenseConv<bf16>& conv) { return conv.C % 16 || conv.C_out % 16; }

void convolve(const DenseConv<float>&, const ConvArguments<float>& p) { dynamic_conv(p); }
void convolve(const DenseConv<bf16>& conv, const ConvArguments<bf16>& p) {
  by_pairs(conv) ? dynamic_conv_dot(p) : dynamic_conv(p);
}

template <class T>
void run(const DenseConv<T>& c, const T* x, T* out, const int32_t* order, int64_t count, int64_t H, int64_t W) {
  if (!count) return;
  const int32_t offsets[] = {0, static_cast<int32_t>(count)};
  ConvArguments<T> p{};
  p.B = count, p.H = H, p.W = W, p.C = c.C;
  p.Ho = c.out(H, c.R), p.Wo = c.out(W, c.S), p.C_out = c.C_out;
  p.R = c.R, p.S = c.S;
  for (int i = 0; i < 2; ++i) p.stride[i] = c.stride, p.padding[i] = c.padding, p.dilation[i] = 1;
  p.route = {1, 0, order, offsets, nullptr};
  p.x = x, p.out = out, p.weight = c.weight, p.bias = c.bias, p.relu = c.relu;
  p.write_whole_map();
  const FewThreads few(c.cost(p.Ho * p.Wo) * static_cast<double>(count) < shared_work);
  convolve(c, p);
}

}  // namespace

void dense_conv(const DenseConv<float>& conv, const float* x, float* out, const int32_t* order, int64_t count,
                int64_t H, int64_t W) {
  run(conv, x, out, order, count, H, W);
}
void dense_conv(const DenseConv<bf16>& conv, const bf16* x, bf16* out, const int32_t* order, int64_t count, int64_t H,
                int64_t W) {
  run(conv, x, out, order, count, H, W);
}

int64_t dense_packed_size(const DenseConv<float>& c) {
  return (c.C_out + 15) / 16 * ((c.C + 15) / 16) * c.R * c.S * 256;
}
int64_t dense_packed_size(const DenseConv<bf16>& c) {
  if (by_pairs(c)) return (c.C_out + 15) / 16 * ((c.C + 31) / 32) * c.R * c.S * 512;
  return packed_size_bf16(c.C_out, c.R, c.S, widths_of({}, c.C));
}

void pack_dense(const DenseConv<float>& c, const float* weight, float* packed) {
  pack_weights(weight, nullptr, packed, c.C_out, c.R * c.S, c.C);
}
void pack_dense(const DenseConv<bf16>& c, const bf16* weight, bf16* packed) {
  if (by_pairs(c))
    pack_weights_dot(weight, nullptr, packed, c.C_out, c.R * c.S, c.C);
  else
    pack_weights_bf16(weight, nullptr, packed, c.C_out, c.R, c.S, widths_of({}, c.C));
}

}  // namespace den_kernels
