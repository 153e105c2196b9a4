#include "dense_conv.h"

#include <algorithm>
#include <vector>

#include "direct_chunks.h"
#include "dynamic_bf16.h"
#include "dynamic_conv.h"
#include "instance_queue.h"
#include "max_pool.h"

namespace den_kernels {
namespace {

// bfloat16 images have few channels, which the kernels that take 16 together do not; dot products of pairs do.
bool by_pairs(const DenseConv<bf16>& conv) { return conv.C % 16 || conv.C_out % 16; }

void convolve(const DenseConv<float>&, const ConvArguments<float>& p) { dynamic_conv(p); }
void convolve(const DenseConv<bf16>& conv, const ConvArguments<bf16>& p) {
  by_pairs(conv) ? dynamic_conv_dot(p) : dynamic_conv(p);
}

// In float32 the columns of kernels over few channels are channels of one tap.
constexpr int64_t few_channels = 16;
bool joined(const DenseConv<float>& conv) { return conv.C < few_channels && conv.S > 1; }
bool joined(const DenseConv<bf16>&) { return false; }

// The convolution of instances order[0 .. offsets[1] - 1] as the kernel has it, of rows first .. first + rows - 1 of
// its map: all of a map lies at `out` [., rows, Wo, C_out].
template <class T>
ConvArguments<T> arguments_of(const DenseConv<T>& c, int64_t H, int64_t W, int64_t first, int64_t rows) {
  ConvArguments<T> p{};
  const int64_t top = first * c.stride - c.padding;  // the input row that the first tap reads
  p.H = H - std::max<int64_t>(top, 0), p.W = W, p.C = c.C;
  p.Ho = rows, p.Wo = c.convolved(W, c.S), p.C_out = c.C_out;
  p.R = c.R, p.S = c.S;
  for (int i = 0; i < 2; ++i) p.stride[i] = c.stride, p.padding[i] = c.padding, p.dilation[i] = 1;
  p.padding[0] = std::max<int64_t>(-top, 0);
  p.weight = c.weight, p.bias = c.bias, p.relu = c.relu, p.joined = joined(c);
  p.write_whole_map();
  return p;
}

template <class T>
void run(const DenseConv<T>& c, const T* x, T* out, const int32_t* order, int64_t count, int64_t H, int64_t W) {
  const int32_t offsets[] = {0, static_cast<int32_t>(count)};
  ConvArguments<T> p = arguments_of(c, H, W, 0, c.convolved(H, c.R));
  p.B = count, p.x = x, p.out = out, p.route = {1, 0, order, offsets, nullptr};
  const FewThreads few(c.cost(p.Ho * p.Wo) * static_cast<double>(count) < shared_work);
  convolve(c, p);
}

// Rows first .. last - 1 of one instance's output: the rows of the convolution's map that they read go into `map`.
template <class T>
void run_pooled(const DenseConv<T>& c, const T* x, T* out, int64_t H, int64_t W, int64_t first, int64_t last, T* map) {
  const int64_t Ho = c.convolved(H, c.R), top = first * c.pool.stride - c.pool.padding;
  const int64_t begin = std::max<int64_t>(top, 0),
                end = std::min(Ho, top + (last - 1 - first) * c.pool.stride + c.pool.size);
  const int32_t order[] = {0}, offsets[] = {0, 1};
  ConvArguments<T> p = arguments_of(c, H, W, begin, end - begin);
  p.B = 1, p.x = x + std::max<int64_t>(begin * c.stride - c.padding, 0) * W * c.C, p.out = map;
  p.route = {1, 0, order, offsets, nullptr};
  convolve(c, p);
  const int64_t width = c.out(W, c.S) * c.C_out;
  share_items(last - first, [&](int64_t i, int64_t until) {
    for (i += first; i < first + until; ++i)
      max_pool_row(map, out + i * width, end - begin, p.Wo, c.C_out, i * c.pool.stride - c.pool.padding - begin,
                   c.pool);
  });
}

// Bands of output rows, each with as much of the convolution's map as stays in a core's cache.
template <class T>
void run_pooled(const DenseConv<T>& c, const T* x, T* out, const int32_t* order, int64_t count, int64_t H, int64_t W) {
  const int64_t Ho = c.out(H, c.R), row = c.convolved(W, c.S) * c.C_out;
  const int64_t fits = scratch_bytes() / (row * static_cast<int64_t>(sizeof(T))) - c.pool.size;
  const int64_t rows = std::min(std::max<int64_t>(fits / c.pool.stride + 1, 1), Ho), bands = (Ho + rows - 1) / rows;
  const int64_t values = ((rows - 1) * c.pool.stride + c.pool.size) * row;
  share_out(count * bands, omp_get_max_threads(), [&](int64_t i) {
    thread_local std::vector<T> map;
    if (static_cast<int64_t>(map.size()) < values) map.resize(static_cast<size_t>(values));
    const int64_t instance = order[i / bands], first = i % bands * rows;
    run_pooled(c, x + instance * H * W * c.C, out + instance * Ho * c.out(W, c.S) * c.C_out, H, W, first,
               std::min(first + rows, Ho), map.data());
  });
}

template <class T>
void run_dense(const DenseConv<T>& conv, const T* x, T* out, const int32_t* order, int64_t count, int64_t H,
               int64_t W) {
  if (!count) return;
  conv.pool.size ? run_pooled(conv, x, out, order, count, H, W) : run(conv, x, out, order, count, H, W);
}

}  // namespace

void dense_conv(const DenseConv<float>& conv, const float* x, float* out, const int32_t* order, int64_t count,
                int64_t H, int64_t W) {
  run_dense(conv, x, out, order, count, H, W);
}
void dense_conv(const DenseConv<bf16>& conv, const bf16* x, bf16* out, const int32_t* order, int64_t count, int64_t H,
                int64_t W) {
  run_dense(conv, x, out, order, count, H, W);
}

int64_t dense_packed_size(const DenseConv<float>& c) {
  const int64_t columns = joined(c) ? 1 : c.S, channels = c.C * c.S / columns;
  return (c.C_out + 15) / 16 * ((channels + 15) / 16) * c.R * columns * 256;
}
int64_t dense_packed_size(const DenseConv<bf16>& c) {
  if (by_pairs(c)) return (c.C_out + 15) / 16 * ((c.C + 31) / 32) * c.R * c.S * 512;
  return packed_size_bf16(c.C_out, c.R, c.S, widths_of({}, c.C));
}

void pack_dense(const DenseConv<float>& c, const float* weight, float* packed) {
  const int64_t columns = joined(c) ? 1 : c.S;  // [C_out, R, S, C] is [C_out, R, 1, S * C] as well
  pack_weights(weight, nullptr, packed, c.C_out, c.R * columns, c.C * c.S / columns);
}
void pack_dense(const DenseConv<bf16>& c, const bf16* weight, bf16* packed) {
  if (by_pairs(c))
    pack_weights_dot(weight, nullptr, packed, c.C_out, c.R * c.S, c.C);
  else
    pack_weights_bf16(weight, nullptr, packed, c.C_out, c.R, c.S, widths_of({}, c.C));
}

}  // namespace den_kernels
