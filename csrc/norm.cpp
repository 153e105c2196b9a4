#include "norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "norm_spans.h"

namespace den_kernels {
namespace {

// Sums over blocks, in double: the means weighted by their rows, then the squares about the mean of all.
DEN_KERNELS_CLONES void add_means(const float* mean, const Span& s, double* count, double* sum) {
  for (int64_t c = 0; c < s.width; ++c) {
    count[c] += static_cast<double>(s.rows);
    sum[c] += static_cast<double>(s.rows) * mean[c];
  }
}

DEN_KERNELS_CLONES void add_squares(const float* mean, const float* squares, const Span& s, const double* centre,
                                    double* total) {
  for (int64_t c = 0; c < s.width; ++c) {
    const double d = mean[c] - centre[c];
    total[c] += squares[c] + static_cast<double>(s.rows) * d * d;
  }
}

DEN_KERNELS_CLONES void add_gradients(const float* g, const float* gx, const Span& s, double* sum_g, double* sum_gx) {
  for (int64_t c = 0; c < s.width; ++c) {
    sum_g[c] += g[c];
    sum_gx[c] += gx[c];
  }
}

void zero(const NormBatch& batch, void* y, const Span& s) {
  char* out = static_cast<char*>(y) + s.offset * batch.element_bytes;
  if (s.width == s.stride) {
    std::memset(out, 0, s.rows * s.width * batch.element_bytes);
    return;
  }
  for (int64_t r = 0; r < s.rows; ++r)
    std::memset(out + r * s.stride * batch.element_bytes, 0, s.width * batch.element_bytes);
}

// Rows of one block: few enough that float32 sums over them are exact to a few units in the last place. Blocks depend
// on the shape alone, and their sums are added in order, so the result does not depend on the number of threads.
constexpr int64_t block_rows = 256;

// Below this many elements waking the other threads costs more than it saves.
[[maybe_unused]] constexpr int64_t serial_elements = 16384;

int64_t rows_of(const NormBatch& batch) { return batch.P / batch.fold; }
int64_t lanes_of(const NormBatch& batch) { return batch.C * batch.fold; }
int64_t blocks_of(const NormBatch& batch) { return (rows_of(batch) + block_rows - 1) / block_rows; }

// Calls visit(first channel, width, used) for the runs of channels that instance b uses or does not use.
template <class Visit>
void visit_channels(const NormBatch& batch, int64_t b, Visit visit) {
  const int64_t G = static_cast<int64_t>(batch.ends.size());
  const uint8_t* chosen = batch.selection + b * G;
  for (int64_t i = 0, channel = 0; i < G; channel = batch.ends[i - 1]) {
    const bool used = chosen[i];
    while (i < G && static_cast<bool>(chosen[i]) == used) ++i;
    visit(channel, batch.ends[i - 1] - channel, used);
  }
}

// Calls used(span) for what an instance uses of a block of rows and unused(span) for the rest, in parallel over blocks.
template <class Used, class Unused>
void in_parallel(const NormBatch& batch, Used used, Unused unused) {
  const int64_t rows = rows_of(batch), lanes = lanes_of(batch), blocks = blocks_of(batch);
#pragma omp parallel for schedule(dynamic, 4) if (batch.B * rows * lanes > serial_elements)
  for (int64_t block = 0; block < batch.B * blocks; ++block) {
    const int64_t b = block / blocks, row = block % blocks * block_rows;
    Span whole{(b * rows + row) * lanes, std::min(block_rows, rows - row), lanes, lanes, 0, block};
    bool any = false;
    visit_channels(batch, b, [&](int64_t channel, int64_t width, bool is_used) {
      any |= is_used;
      if (batch.fold > 1) return;
      const Span span{whole.offset + channel, whole.rows, lanes, width, channel, block};
      is_used ? used(span) : unused(span);
    });
    if (batch.fold > 1) any ? used(whole) : unused(whole);
  }
}

void nothing(const Span&) {}

// Calls add(first channel, span) for the used lanes of all blocks, in an order that depends on the shape alone.
template <class Add>
void in_order(const NormBatch& batch, Add add) {
  const int64_t rows = rows_of(batch), blocks = blocks_of(batch);
  for (int64_t block = 0; block < batch.B * blocks; ++block) {
    const int64_t used_rows = std::min(block_rows, rows - block % blocks * block_rows);
    visit_channels(batch, block / blocks, [&](int64_t channel, int64_t width, bool is_used) {
      for (int64_t i = 0; is_used && i < batch.fold; ++i)
        add(channel, Span{0, used_rows, 0, width, i * batch.C + channel, block});
    });
  }
}

// Two values of every lane for every block; only those of used lanes mean something.
class BlockSums {
 public:
  explicit BlockSums(const NormBatch& batch)
      : lanes_(lanes_of(batch)), values_(batch.B * blocks_of(batch) * 2 * lanes_) {}
  float* first(const Span& s) { return values_.data() + 2 * s.block * lanes_ + s.lane; }
  float* second(const Span& s) { return first(s) + lanes_; }

 private:
  int64_t lanes_;
  std::vector<float> values_;
};

// Coefficients of all lanes, with the storage behind them.
class CoefficientTable {
 public:
  CoefficientTable(const NormBatch& batch, const NormAffine& affine, const float* sums)
      : batch_(batch),
        lanes_(lanes_of(batch)),
        values_(5 * lanes_),
        ones_(lanes_, ~0u),
        floor_(affine.relu ? 0.f : std::numeric_limits<float>::quiet_NaN()) {
    float *mean = values_.data(), *scale = mean + lanes_, *bias = scale + lanes_, *dmean = bias + lanes_,
          *dvar = dmean + lanes_;
    for (int64_t i = 0, C = batch.C; i < lanes_; ++i) {
      const int64_t c = i % C;
      const float inverse = 1.f / std::sqrt(affine.statistics[C + c] + affine.eps);
      mean[i] = affine.statistics[c];
      scale[i] = affine.weight ? affine.weight[c] * inverse : inverse;
      bias[i] = affine.bias ? affine.bias[c] : 0.f;
      if (!sums) continue;
      const float share = scale[i] / affine.statistics[2 * C + c];
      dmean[i] = share * sums[c];
      dvar[i] = share * sums[C + c] * inverse;
    }
  }

  // Coefficients of a span; `keep` holds the lanes in use of a folded one.
  Coefficients at(const Span& s, uint32_t (&keep)[folded_lanes]) const {
    if (batch_.fold > 1)
      visit_channels(batch_, s.block / blocks_of(batch_), [&](int64_t channel, int64_t width, bool used) {
        for (int64_t i = 0; i < batch_.fold; ++i) std::fill_n(keep + i * batch_.C + channel, width, used ? ~0u : 0u);
      });
    const float* mean = values_.data() + s.lane;
    return {mean,
            mean + lanes_,
            mean + 2 * lanes_,
            mean + 3 * lanes_,
            mean + 4 * lanes_,
            batch_.fold > 1 ? keep : ones_.data() + s.lane,
            floor_};
  }

 private:
  const NormBatch& batch_;
  int64_t lanes_;
  std::vector<float> values_;
  std::vector<uint32_t> ones_;
  float floor_;
};

}  // namespace

void norm_statistics(const NormBatch& batch, const void* x, float* statistics) {
  const auto run = span_loops(batch.element_bytes).moments;
  const int64_t C = batch.C;
  BlockSums sums(batch);
  in_parallel(batch, [&](const Span& s) { run(x, s, sums.first(s), sums.second(s)); }, nothing);
  std::vector<double> mean(C), squares(C), count(C);
  in_order(batch, [&](int64_t c, const Span& s) { add_means(sums.first(s), s, &count[c], &mean[c]); });
  for (int64_t c = 0; c < C; ++c) mean[c] /= std::max(count[c], 1.0);
  in_order(batch,
           [&](int64_t c, const Span& s) { add_squares(sums.first(s), sums.second(s), s, &mean[c], &squares[c]); });
  for (int64_t c = 0; c < C; ++c) {
    statistics[c] = static_cast<float>(mean[c]);
    statistics[C + c] = static_cast<float>(squares[c] / std::max(count[c], 1.0));
    statistics[2 * C + c] = static_cast<float>(count[c]);
  }
}

void norm_apply(const NormBatch& batch, const NormAffine& affine, const void* x, void* y) {
  const auto run = span_loops(batch.element_bytes).apply;
  const CoefficientTable table(batch, affine, nullptr);
  const auto used = [&](const Span& s) {
    uint32_t keep[folded_lanes];
    run(x, y, s, table.at(s, keep));
  };
  in_parallel(batch, used, [&](const Span& s) { zero(batch, y, s); });
}

void norm_reduce(const NormBatch& batch, const NormAffine& affine, const void* dy, const void* x, float* sums) {
  const auto run = span_loops(batch.element_bytes).reduce;
  const CoefficientTable table(batch, affine, nullptr);
  const int64_t C = batch.C;
  BlockSums parts(batch);
  const auto used = [&](const Span& s) {
    uint32_t keep[folded_lanes];
    run(dy, x, s, table.at(s, keep), parts.first(s), parts.second(s));
  };
  in_parallel(batch, used, nothing);
  std::vector<double> g(C), gx(C);
  in_order(batch, [&](int64_t c, const Span& s) { add_gradients(parts.first(s), parts.second(s), s, &g[c], &gx[c]); });
  for (int64_t c = 0; c < C; ++c) {
    sums[c] = static_cast<float>(g[c]);
    sums[C + c] = static_cast<float>(gx[c] / std::sqrt(static_cast<double>(affine.statistics[C + c]) + affine.eps));
  }
}

void norm_gradient(const NormBatch& batch, const NormAffine& affine, const void* dy, const void* x, const float* sums,
                   void* dx) {
  const auto run = span_loops(batch.element_bytes).gradient;
  const CoefficientTable table(batch, affine, sums);
  const auto used = [&](const Span& s) {
    uint32_t keep[folded_lanes];
    run(dy, x, dx, s, table.at(s, keep));
  };
  in_parallel(batch, used, [&](const Span& s) { zero(batch, dx, s); });
}

}  // namespace den_kernels
