// Barrier, Failure and share_out of csrc/parallel.h under the thread sanitizer: parallel_main CASE. Ends with 0 where
// what must hold does; the sanitizer ends it at the first race.
#include "parallel.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using den_kernels::Barrier;
using den_kernels::Failure;
using den_kernels::share_out;

constexpr int threads = 3;

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "parallel_main: %s\n", what);
  std::exit(1);
}

template <class Work>
void run(Work work) {
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back(work, i);
  for (std::thread& each : all) each.join();
}

// Between two waits a thread reads what the others wrote before the first, also where one comes so late that they
// sleep.
void barrier() {
  Barrier barrier;
  int written[2][threads] = {};
  run([&](int thread) {
    for (int turn = 0; turn < 400; ++turn) {
      if (turn % 100 == 99 && turn / 100 % threads == thread) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      written[turn % 2][thread] = turn;
      barrier.wait(threads);
      for (const int value : written[turn % 2]) must(value == turn, "a thread has passed before another has come");
    }
  });
}

// A thread that has failed opens the barrier: the others, awake or asleep, and all who come later, pass.
void opened() {
  for (const int milliseconds : {0, 3}) {
    Barrier barrier;
    run([&](int thread) {
      if (thread) {
        for (int turn = 0; turn < 5; ++turn) barrier.wait(threads);
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
      barrier.open();
    });
  }
}

// The first of several exceptions is kept and thrown behind the region, and nothing begins after it.
void failure() {
  for (int turn = 0; turn < 100; ++turn) {
    Failure failure;
    int later = 0;
    run([&](int thread) {
      failure.guard([&] { throw std::invalid_argument(std::to_string(thread)); });
      must(failure.any(), "a failure is not seen");
    });
    failure.guard([&] { ++later; });
    must(later == 0, "work begins after a failure");
    bool thrown = false;
    try {
      failure.rethrow();
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    must(thrown, "an exception is lost");
  }
  Failure none;
  int runs = 0;
  none.guard([&] { ++runs; });
  none.rethrow();
  must(runs == 1 && !none.any(), "work that does not fail runs once");
}

// Every item is one thread's, all are done behind the call, and one thread takes them in their order.
void shared() {
  for (int64_t count : {0, 1, 2, 3, 50}) {
    std::vector<int> times(count);
    share_out(count, threads, [&](int64_t i) {
      must(0 <= i && i < count, "an item that is none");
      ++times[i];
    });
    for (const int each : times) must(each == 1, "an item is done once");
  }
  std::vector<int64_t> order;
  share_out(5, 1, [&](int64_t i) { order.push_back(i); });
  must(order == std::vector<int64_t>{0, 1, 2, 3, 4}, "one thread takes the items in their order");
}

}  // namespace

int main(int count, char** arguments) {
  const struct {
    const char* name;
    void (*run)();
  } cases[] = {{"barrier", barrier}, {"opened", opened}, {"failure", failure}, {"shared", shared}};
  for (const auto& each : cases)
    if (count == 2 && !std::strcmp(arguments[1], each.name)) {
      each.run();
      return 0;
    }
  std::fprintf(stderr, "parallel_main: CASE must be barrier, opened, failure or shared\n");
  return 2;
}
