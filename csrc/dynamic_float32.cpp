#include "dynamic_float32.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "check.h"
#include "dispatch.h"

namespace den_kernels {
namespace {

enum Isa : int { none, avx2, avx512 };
constexpr const char* names[] = {"", "AVX2", "AVX-512"};

#ifdef DEN_KERNELS_HAS_AVX512
Isa best_isa() {
  static const Isa best = DEN_KERNELS_HAS_AVX512 ? avx512 : DEN_KERNELS_HAS_AVX2 ? avx2 : none;
  return best;
}
#else
constexpr Isa best_isa() { return none; }
#endif

std::atomic<Isa> limit{avx512};

Isa isa() { return std::min(limit.load(std::memory_order_relaxed), best_isa()); }

// The kernel of `op` that runs here.
template <class Kernel>
Kernel kernel_of(const char* op, Kernel with_avx512, Kernel with_avx2) {
  const Isa found = isa();
  if (found == none)
    throw std::runtime_error(std::string(op) + ": this CPU has no AVX2, or float32 kernels are limited to none");
  return found == avx512 ? with_avx512 : with_avx2;
}

}  // namespace

#ifdef DEN_KERNELS_HAS_AVX512
#define DEN_KERNELS_CHOOSE(op, function) kernel_of(op, &function##_avx512, &function##_avx2)
#else
#define DEN_KERNELS_CHOOSE(op, function) kernel_of<decltype(&function##_avx512)>(op, nullptr, nullptr)
#endif

const char* float32_isa() { return names[isa()]; }

void limit_float32_isa(const std::string& isa) {
  const auto* found = std::find(std::begin(names), std::end(names), isa);
  check(found != std::end(names), "limit_float32_isa", "isa", "\"AVX-512\", \"AVX2\" or \"\"", '"' + isa + '"');
  limit = static_cast<Isa>(found - std::begin(names));
}

bool has_direct_float32() { return isa() != none; }

void dynamic_residual(const ResidualBlock<float>& b) {
  const bool rows = b.scale2 || b.unpacked2;
  (rows ? DEN_KERNELS_CHOOSE("dynamic_residual", dynamic_residual_rows)
        : DEN_KERNELS_CHOOSE("dynamic_residual", dynamic_residual))(b);
}

void dynamic_conv(const ConvArguments<float>& p) { DEN_KERNELS_CHOOSE("dynamic_conv", dynamic_conv)(p); }

void dynamic_conv_weight_gradient(const ConvArguments<float>& p, const float* grad, float* dweight) {
  DEN_KERNELS_CHOOSE("dynamic_conv", dynamic_conv_weight_gradient)(p, grad, dweight);
}

void dynamic_bottleneck(const BottleneckArguments<float>& p) {
  DEN_KERNELS_CHOOSE("dynamic_bottleneck", dynamic_bottleneck)(p);
}

void dynamic_inverted_residual(const InvertedResidual& p) {
  DEN_KERNELS_CHOOSE("dynamic_inverted_residual", dynamic_inverted_residual)(p);
}

void dynamic_graph(const GraphArguments& p) { DEN_KERNELS_CHOOSE("dynamic_graph", dynamic_graph)(p); }

void pack_weights(const float* weight, const float* scale, float* packed, int64_t O, int64_t taps, int64_t I) {
  DEN_KERNELS_CHOOSE("pack_weights", pack_weights)(weight, scale, packed, O, taps, I);
}

void pack_turned_weights(const float* weight, float* packed, int64_t O, int64_t taps, int64_t I) {
  const int64_t O_blocks = (O + 15) / 16, I_blocks = (I + 15) / 16;
#pragma omp parallel for collapse(2) schedule(static) if (O * taps * I > 16384)
  for (int64_t i = 0; i < I_blocks; ++i)
    for (int64_t o = 0; o < O_blocks; ++o) {
      const int64_t outputs = std::min<int64_t>(16, O - o * 16), inputs = std::min<int64_t>(16, I - i * 16);
      for (int64_t t = 0; t < taps; ++t) {
        float* to = packed + ((i * O_blocks + o) * taps + t) * 256;
        if (outputs < 16 || inputs < 16) std::fill_n(to, 256, 0.f);
        for (int64_t q = 0; q < outputs; ++q)
          std::copy_n(weight + ((o * 16 + q) * taps + taps - 1 - t) * I + i * 16, inputs, to + q * 16);
      }
    }
}

}  // namespace den_kernels
