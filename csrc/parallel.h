// Work shared out among threads, beside other processes too, and what it throws.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

#include "openmp.h"

namespace den_kernels {

// Exceptions in parallel regions. One that leaves an OpenMP region ends the process: work that may throw (it takes
// memory) runs through a Failure, which keeps the first exception until the region is over.

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
  // Behind the region: throws what was kept.
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr first_;
};

// A thread's share of items 0..count, `threads` threads sharing.
inline void share(int64_t count, int64_t thread, int64_t threads, int64_t& begin, int64_t& end) {
  begin = count * thread / threads;
  end = count * (thread + 1) / threads;
}

// Leaves a core's resources to its other thread for some cycles.
inline void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Holds the threads of a region until all have come. They wait busily for as long as usual work differs, then asleep:
// GNU OpenMP's own barriers are busy for milliseconds, on a core that the thread which they wait for may need where
// another process has taken its own.
class Barrier {
 public:
  // Called by each of `threads` threads.
  void wait(int64_t threads) {
    if (open_.load(std::memory_order_acquire)) return;
    const uint32_t turn = turn_.load(std::memory_order_acquire);
    if (come_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      come_.store(0, std::memory_order_relaxed);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        turn_.store(turn + 1, std::memory_order_release);
      }
      next_.notify_all();
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < 64; ++i) {
        if (turn_.load(std::memory_order_acquire) != turn || open_.load(std::memory_order_relaxed)) return;
        rest();
      }
    } while (std::chrono::steady_clock::now() - start < busy);
    std::unique_lock<std::mutex> lock(mutex_);
    next_.wait(lock, [&] { return turn_.load(std::memory_order_relaxed) != turn || open_; });
  }
  // Holds nobody any more: a thread that has failed will not come.
  void open() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_ = true;
    }
    next_.notify_all();
  }

 private:
  static constexpr std::chrono::microseconds busy{50};  // about as long as it takes to be woken
  std::atomic<int64_t> come_{0};
  std::atomic<uint32_t> turn_{0};
  std::atomic<bool> open_{false};
  std::mutex mutex_;
  std::condition_variable next_;
};

// Threads that go through the same layers side by side and share each of them: between two layers no region ends and
// none begins, which takes as long as a small layer. All of them call every layer; what a layer has prepared is each
// thread's own, and the same in all of them.
class Team {
 public:
  // The team that this thread is of, or null.
  static Team* current() { return member().team; }
  // This thread's number in it, and how many they are.
  static int64_t place() { return member().place; }
  static int64_t size() { return member().size; }

  // Holds each thread until all have come.
  void wait() {
    barrier_.wait(size());
    if (failure_.any()) throw Failed();
  }
  // One memory for all, of at least so many bytes, which `make(bytes)` gives the first thread. Whoever asks has been
  // behind a wait() since it was last used.
  template <class Make>
  void* memory(int64_t bytes, Make make) {
    if (bytes > held_[place()]) {
      held_[place()] = bytes;
      if (place() == 0) memory_ = make(bytes);
      wait();
    }
    return memory_;
  }

  // Calls work() in each of `threads` threads, which are a team meanwhile.
  template <class Work>
  static void run(int64_t threads, Work work) {
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
      member() = {&team, omp_get_thread_num(), omp_get_num_threads()};
      team.failure_.guard([&] {
        try {
          work();
        } catch (const Failed&) {  // another thread has
        }
      });
      if (team.failure_.any()) team.barrier_.open();
      team.end_.wait(size());
      member() = {};
    }
    team.failure_.rethrow();
  }

 private:
  struct Failed {};
  struct Member {
    Team* team = nullptr;
    int64_t place = 0, size = 1;
  };
  static Member& member() {
    thread_local Member own;
    return own;
  }
  explicit Team(int64_t threads) : held_(static_cast<size_t>(threads), 0) {}

  Barrier barrier_, end_;
  Failure failure_;
  void* memory_ = nullptr;
  std::vector<int64_t> held_;  // what each thread has seen of the memory
};

// Calls work(0), ..., work(count - 1), in this order, each by the next of `threads` threads that is free.
template <class Work>
void share_out(int64_t count, int64_t threads, Work work) {
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  Barrier end;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    end.wait(omp_get_num_threads());
  }
}

}  // namespace den_kernels
