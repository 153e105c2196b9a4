// The instances of a batch, which do not depend on each other, shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "openmp.h"
#include "parallel.h"

namespace den_kernels {

// Most instances of a chunk. A larger chunk reads its weights for more instances at once, but the other threads wait
// longer for the last one.
constexpr int64_t most_instances = 32;
// Multiply-adds of a layer that one thread takes alone, a core's work of 18 microseconds: sharing it would save less
// than half of that, and costs a multiple where the other thread has to wait for its core.
constexpr double shared_work = 1 << 21;

// This thread's parallel regions have one thread while it lives; with a number of multiply-adds only where these are
// few.
struct FewThreads {
  const int threads = omp_get_max_threads();
  explicit FewThreads(double work = 0) {
    if (work < shared_work) omp_set_num_threads(1);
  }
  ~FewThreads() { omp_set_num_threads(threads); }
  FewThreads(const FewThreads&) = delete;
  FewThreads& operator=(const FewThreads&) = delete;
};

// Where the chunks of the instances, in their order, end: each takes half of a thread's share of the cost that is left
// at most, so that threads end together, whichever of them loses its core for a while.
inline std::vector<int64_t> chunk_ends(const std::vector<double>& costs, const std::vector<int32_t>& order,
                                       int64_t threads) {
  const int64_t B = static_cast<int64_t>(order.size());
  double left = std::accumulate(costs.begin(), costs.end(), 0.);
  std::vector<int64_t> ends;
  for (int64_t i = 0; i < B;) {
    const int64_t first = i, share = threads == 1 ? 1 : 2 * threads;
    double taken = 0, most = left / static_cast<double>(share);
    do taken += costs[order[i++]];
    while (i < B && i - first < most_instances && taken + costs[order[i]] <= most);
    left -= taken;
    ends.push_back(i);
  }
  return ends;
}

// Calls work(instances, count, shared) until all instances had it. costs: [B], multiply-adds of each. Chunks of like
// cost come from one queue, dearest first, each the work of one thread, with no other to help it. Fewer than two
// instances a thread, and their `layers` no small ones: all instances at once, `shared`, and the threads share each
// layer.
template <class Work>
void for_chunks(const std::vector<double>& costs, int64_t layers, Work work) {
  const int64_t B = static_cast<int64_t>(costs.size()), threads = omp_get_max_threads();
  std::vector<int32_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  const double most = B ? *std::max_element(costs.begin(), costs.end()) : 0.;
  if (threads > 1 && B < 2 * threads && most >= shared_work * static_cast<double>(layers))
    return work(order.data(), B, true);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
  const std::vector<int64_t> ends = chunk_ends(costs, order, threads);
  Failure failure;
  share_out(static_cast<int64_t>(ends.size()), threads, [&](int64_t i) {
    const FewThreads alone;
    const int64_t first = i ? ends[i - 1] : 0;
    failure.guard([&] { work(order.data() + first, ends[i] - first, false); });
  });
  failure.rethrow();
}

}  // namespace den_kernels
