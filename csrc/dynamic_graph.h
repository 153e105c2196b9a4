// A directed acyclic graph of convolutions on a CPU, each instance with the edges that it keeps: the whole graph in one
// call, an instance's states never leaving the core's cache. float32 with AVX-512
// or AVX2.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace den_kernels {

// For every instance b and state j, in order:
//   v[j] = read_in[b, j] * x[b] + sum over the edges e = (i, j) with levels[e, b] > 0 of
//          gates[b, e] * relu(conv(v[i], weight[e]) + bias[e])
//   out[b] += read_out[b, j] * v[j],  out being 0 at first
// Maps are channels-last; zero padding of half the kernel, stride 1.
struct GraphArguments {
  int64_t B, H, W, C, N;                           // N states
  int64_t R, S;                                    // kernel sides, odd
  std::vector<std::pair<int64_t, int64_t>> edges;  // [E] (i, j), i < j, in the order of j
  const int32_t* levels;                           // [E, B]
  const float* read_in;                            // [B, N]
  const float* gates;                              // [B, E]
  const float* read_out;                           // [B, N]
  const float* x;                                  // [B, H, W, C]
  float* out;                                      // [B, H, W, C]
  std::vector<const float*> weights;               // [E] packed by pack_weights
  std::vector<const float*> biases;                // [E] of [C]
};

// Needs AVX-512 or AVX2 (has_direct_float32) and a kernel of at most 49 taps.
void dynamic_graph(const GraphArguments& arguments);

}  // namespace den_kernels
