// Work shared out among threads, beside other processes too, and what it throws.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#include "crew.h"
#include "openmp.h"

namespace den_kernels {

// Exceptions of several threads: work that may throw (it takes memory) runs through a Failure, which keeps the first
// exception until all threads are through.
class Failure {
 public:
  // Runs work() unless something has failed already; any thread may call it.
  template <class Work>
  void guard(Work&& work) noexcept {
    if (any()) return;
    try {
      work();
    } catch (...) {
      if (!failed_.exchange(true)) first_ = std::current_exception();
    }
  }
  bool any() const noexcept { return failed_.load(std::memory_order_relaxed); }
  // When all are through: throws what was kept.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr first_;
};

// This thread's parallel regions have one thread while it lives; unless `alone` is false.
struct FewThreads {
  const int threads = omp_get_max_threads();
  explicit FewThreads(bool alone = true) {
    if (alone) omp_set_num_threads(1);
  }
  ~FewThreads() { omp_set_num_threads(threads); }
  FewThreads(const FewThreads&) = delete;
  FewThreads& operator=(const FewThreads&) = delete;
};

// Threads that share the layers of a network one after the other. One of them calls the layers; of each it offers the
// parts to all.
class Team {
 public:
  // The team whose layers this thread calls, or null.
  static Team* current() { return own(); }
  int64_t threads() const { return crew_.threads(); }

  // Calls work(part) for the parts 0 .. count - 1, each in the next thread that is free; throws the first exception.
  template <class Work>
  void run_parts(int64_t count, const Work& work) {
    run_parts(count, true, false, work);
  }

  // Calls work() in this thread, which has a team of `threads` threads meanwhile.
  template <class Work>
  static void run(int64_t threads, Work work) {
    Team team(threads);
    team.gather([&] {
      const Current current(&team);
      work();
    });
  }

 private:
  template <class Work>
  friend void share_out(int64_t count, int64_t threads, Work work);

  // This thread's team while it lives.
  struct Current {
    Team* const before = own();
    explicit Current(Team* team) { own() = team; }
    ~Current() { own() = before; }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
  };

  explicit Team(int64_t threads) : crew_(threads) {}
  // Calls work() in this thread, with helpers; throws what it throws.
  template <class Work>
  void gather(Work work) {
    const FewThreads alone;
    Failure failure;
    crew_.gather([&] { failure.guard(work); });
    failure.rethrow();
  }
  static Team*& own() {
    thread_local Team* found = nullptr;
    return found;
  }
  template <class Work>
  void run_parts(int64_t count, bool own, bool last, const Work& work) {
    struct Guarded {
      const Work& work;
      Failure failure;
    } guarded{work, {}};
    crew_.run(
        count, own, last,
        [](const void* context, int64_t part) {
          auto& all = *static_cast<Guarded*>(const_cast<void*>(context));
          all.failure.guard([&] { all.work(part); });
        },
        &guarded);
    guarded.failure.rethrow();
  }

  Crew crew_;
};

// Parts of a layer for each thread of a team: more than one, so that others can take over those of a thread that comes
// late or loses its core.
constexpr int64_t parts_of_thread = 4;

// Calls work(begin, end) for ranges of items 0 .. count - 1: of them all, or what the threads of a team take at a time.
template <class Work>
void share_items(int64_t count, Work work) {
  Team* team = Team::current();
  const int64_t parts = team ? std::min(count, parts_of_thread * team->threads()) : 1;
  if (parts <= 1) {
    work(int64_t{0}, count);
    return;
  }
  team->run_parts(parts, [&](int64_t part) {
    int64_t begin, end;
    share(count, part, parts, begin, end);
    work(begin, end);
  });
}

// Calls work(0), ..., work(count - 1), in this order, each by the next of `threads` threads that is free; throws the
// first exception.
template <class Work>
void share_out(int64_t count, int64_t threads, Work work) {
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  Team team(threads);
  team.gather([&] { team.run_parts(count, false, true, work); });
}

}  // namespace den_kernels
