// Failure, Team and share_out of csrc/parallel.h and the threads of csrc/crew.h under the thread sanitizer:
// parallel_main CASE. Ends with 0 where what must hold does; the sanitizer ends it at the first race.
#include "parallel.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using den_kernels::Failure;
using den_kernels::share_items;
using den_kernels::share_out;
using den_kernels::Team;

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

// The first of several exceptions is kept and thrown behind the region, and nothing begins after it.
void failure() {
  for (int turn = 0; turn < 100; ++turn) {
    Failure failure;
    std::atomic<int> begun{0};
    int later = 0;
    run([&](int thread) {
      failure.guard([&] {  // all begin before any fails
        for (++begun; begun < threads;) std::this_thread::yield();
        throw std::invalid_argument(std::to_string(thread));
      });
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

void sleep(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

// Layers of a network whose parts read what the layer before wrote; now and then a thread comes so late that the others
// sleep, or all have slept before.
void run_layers(int layers, int64_t count) {
  std::vector<int64_t> before(count, 0), after(count);
  Team::run(threads, [&] {
    for (int layer = 0; layer < layers; ++layer) {
      share_items(count, [&](int64_t begin, int64_t end) {
        if (layer % 50 == 49 && begin == layer / 50 % count) sleep(2);
        for (int64_t i = begin; i < end; ++i) after[i] = before[i] + before[(i + 1) % count] + 1;
      });
      for (int64_t i = 0; i < count; ++i)
        must(after[i] == (int64_t{2} << layer % 40) - 1, "a part reads what the layer before wrote");
      before.swap(after);
      if (layer % 40 == 39) before.assign(count, 0);
      if (layer % 50 == 24) sleep(1);
    }
  });
}
void layers() {
  for (int64_t count : {1, 2, 7, 100}) run_layers(200, count);
  must(!Team::current(), "no team is left");
}

// Several threads call at once, each with helpers of its own.
void callers() {
  run([](int) { run_layers(80, 11); });
}

// An exception of a part comes out of the call, whichever thread had it, and the next call is none the worse.
void thrown() {
  for (int64_t bad = 0; bad < 20; ++bad) {
    bool caught = false;
    try {
      share_out(20, threads, [&](int64_t i) {
        if (i == bad) throw std::invalid_argument("a part");
      });
    } catch (const std::invalid_argument&) {
      caught = true;
    }
    must(caught, "an exception of a part is lost");
    std::atomic<int> done{0};
    share_out(20, threads, [&](int64_t) { ++done; });
    must(done == 20, "a call after an exception does all its parts");
  }
}

// Helpers that do not come out of their first part until all others have been begun: the caller takes these.
void slow() {
  constexpr int count = 60;
  std::atomic<int> begun{0}, done{0};
  const std::thread::id caller = std::this_thread::get_id();
  Team::run(threads, [&] {
    Team::current()->run_parts(count, [&](int64_t) {
      ++begun;
      while (std::this_thread::get_id() != caller && begun < count) std::this_thread::yield();
      ++done;
    });
  });
  must(done == count, "a part is done once all are through");
}

}  // namespace

int main(int count, char** arguments) {
  const struct {
    const char* name;
    void (*run)();
  } cases[] = {{"failure", failure}, {"shared", shared}, {"layers", layers},
               {"callers", callers}, {"thrown", thrown}, {"slow", slow}};
  for (const auto& each : cases)
    if (count == 2 && !std::strcmp(arguments[1], each.name)) {
      each.run();
      return 0;
    }
  std::fprintf(stderr, "parallel_main: CASE must be failure, shared, layers, callers, thrown or slow\n");
  return 2;
}
