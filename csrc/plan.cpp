#include "plan.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace den_kernels {
namespace {

constexpr int64_t kColumns = 16;  // blocks read together: one cache line of int32 levels
[[maybe_unused]] constexpr int64_t kWorthThreads =
    1 << 16;  // instances x blocks below which starting threads costs more than the sort

// Copies a strip of columns of levels [B, N] to rows [N, B]; returns the first index out of 0..G, or B * N.
template <class T>
int64_t read_levels(const T* levels, int64_t B, int64_t N, int64_t G, int64_t first, int64_t last, int32_t* rows) {
  int64_t bad = B * N;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = first; n < last; ++n) {
      const T level = levels[b * N + n];
      if (level < 0 || level > static_cast<T>(G)) bad = std::min(bad, b * N + n);
      rows[n * B + b] = static_cast<int32_t>(level);
    }
  }
  return bad;
}

// Counting sort of one block, descending and stable.
void sort_levels(const int32_t* levels, int64_t B, int64_t G, int32_t* order, int32_t* offsets) {
  std::fill(offsets, offsets + G + 2, 0);
  for (int64_t b = 0; b < B; ++b) ++offsets[G - levels[b] + 1];
  std::partial_sum(offsets, offsets + G + 2, offsets);
  std::vector<int32_t> next(offsets, offsets + G + 1);
  for (int64_t b = 0; b < B; ++b) order[next[G - levels[b]]++] = static_cast<int32_t>(b);
}

// Sorts the masks [B, G] of one block by (count descending, bits descending, instance) and cuts them where they change.
void sort_masks(const uint8_t* masks, int64_t B, int64_t G, int32_t* levels, int32_t* order, int32_t* offsets) {
  const int64_t W = (G + 63) / 64;
  std::vector<uint64_t> words(B * W, 0);  // group 0 is the highest bit, so that words compare as masks do
  for (int64_t b = 0; b < B; ++b) {
    levels[b] = 0;
    for (int64_t g = 0; g < G; ++g) {
      const uint64_t bit = masks[b * G + g] != 0;
      levels[b] += static_cast<int32_t>(bit);
      words[b * W + g / 64] |= bit << (63 - g % 64);
    }
  }
  const auto compare = [&](int32_t a, int32_t b) {  // negative: a before b; 0: equal masks
    if (levels[a] != levels[b]) return levels[a] > levels[b] ? -1 : 1;
    for (int64_t w = 0; w < W; ++w) {
      const uint64_t x = words[a * W + w], y = words[b * W + w];
      if (x != y) return x > y ? -1 : 1;
    }
    return 0;
  };
  std::iota(order, order + B, 0);
  std::sort(order, order + B, [&](int32_t a, int32_t b) {
    const int c = compare(a, b);
    return c != 0 ? c < 0 : a < b;
  });
  int64_t s = 0;
  for (int64_t i = 0; i < B; ++i) {
    if (i == 0 || compare(order[i - 1], order[i]) != 0) offsets[s++] = static_cast<int32_t>(i);
  }
  std::fill(offsets + s, offsets + B + 1, static_cast<int32_t>(B));
}

}  // namespace

template <class T>
int64_t plan_levels(const T* levels, int64_t B, int64_t N, int64_t G, Plan plan) {
  std::atomic<int64_t> bad{B * N};
  Failure failure;
#pragma omp parallel for schedule(static) if (B * N >= kWorthThreads)
  for (int64_t first = 0; first < N; first += kColumns) {
    const int64_t last = std::min(N, first + kColumns);
    const int64_t found = read_levels(levels, B, N, G, first, last, plan.levels);
    if (found < B * N) {
      int64_t seen = bad.load();
      while (found < seen && !bad.compare_exchange_weak(seen, found)) {
      }
      continue;
    }
    failure.guard([&] {
      for (int64_t n = first; n < last; ++n)
        sort_levels(plan.levels + n * B, B, G, plan.order + n * B, plan.offsets + n * (G + 2));
    });
  }
  failure.rethrow();
  return bad < B * N ? bad.load() : -1;
}

void plan_masks(const uint8_t* masks, int64_t B, int64_t N, int64_t G, Plan plan) {
  Failure failure;
#pragma omp parallel for schedule(dynamic) if (B * N * G >= kWorthThreads)
  for (int64_t n = 0; n < N; ++n)
    failure.guard([&] {
      sort_masks(masks + n * B * G, B, G, plan.levels + n * B, plan.order + n * B, plan.offsets + n * (B + 1));
    });
  failure.rethrow();
}

template int64_t plan_levels(const int32_t*, int64_t, int64_t, int64_t, Plan);
template int64_t plan_levels(const int64_t*, int64_t, int64_t, int64_t, Plan);

}  // namespace den_kernels
