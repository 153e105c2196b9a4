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

// True where so many instances are worth chunks of their own for each thread.
inline bool fill_chunks(int64_t instances, int64_t threads) { return threads > 1 && instances >= 2 * threads; }

// Instances, the dearest first.
inline std::vector<int32_t> by_cost(const std::vector<double>& costs) {
  std::vector<int32_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
  return order;
}

// Calls work(instances, count) for the chunks of `order` that end at `ends`, each the work of one thread, with no other
// to help it.
template <class Work>
void run_each(const std::vector<int32_t>& order, const std::vector<int64_t>& ends, int64_t threads, Work work) {
  const FewThreads alone;
  share_out(static_cast<int64_t>(ends.size()), threads, [&](int64_t i) {
    const int64_t first = i ? ends[i - 1] : 0;
    work(order.data() + first, ends[i] - first);
  });
}

// Calls work(instances, count, shared) until all instances had it. costs: [B], multiply-adds of each. Chunks of like
// cost come from one queue, dearest first, each the work of one thread, with no other to help it. Fewer than two
// instances a thread, and their `layers` no small ones: all instances at once, `shared`, and the threads share each
// layer.
template <class Work>
void for_chunks(const std::vector<double>& costs, int64_t layers, Work work) {
  const int64_t B = static_cast<int64_t>(costs.size()), threads = omp_get_max_threads();
  const std::vector<int32_t> order = by_cost(costs);
  const double most = B ? costs[order[0]] : 0.;
  if (threads > 1 && !fill_chunks(B, threads) && most >= shared_work * static_cast<double>(layers))
    return work(order.data(), B, true);
  run_each(order, chunk_ends(costs, order, threads), threads,
           [&](const int32_t* instances, int64_t count) { work(instances, count, false); });
}

// Calls work(instances, count) for as many chunks of like cost as there are threads, or instances.
template <class Work>
void for_shares(const std::vector<double>& costs, Work work) {
  const int64_t B = static_cast<int64_t>(costs.size()), threads = omp_get_max_threads();
  const std::vector<int32_t> order = by_cost(costs);
  double left = std::accumulate(costs.begin(), costs.end(), 0.);
  std::vector<int64_t> ends;
  for (int64_t part = threads, i = 0; i < B; --part) {
    const double most = left / static_cast<double>(part);
    double taken = 0;
    do taken += costs[order[i++]];
    while (i < B && (part == 1 || taken + costs[order[i]] / 2 <= most));
    left -= taken;
    ends.push_back(i);
  }
  run_each(order, ends, threads, work);
}

}  // namespace den_kernels
