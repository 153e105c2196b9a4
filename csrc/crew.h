// Threads that help the one that calls them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "openmp.h"

namespace den_kernels {

// A thread's share of items 0..count, `threads` threads sharing.
inline void share(int64_t count, int64_t thread, int64_t threads, int64_t& begin, int64_t& end) {
  begin = count * thread / threads;
  end = count * (thread + 1) / threads;
}

// One caller and its helpers, the threads of an OpenMP region. What the caller offers has parts, and everybody takes
// the next part that nobody has taken. So nobody waits for a helper that has no core, because another process has it:
// its parts are taken by the others, and the caller waits only for parts that have been begun, and once, at the end,
// for all helpers to leave. Threads wait busily for a moment, then asleep: GNU OpenMP's barriers are busy for
// milliseconds, on a core that the thread which they wait for may need. They are OpenMP's threads, because a second
// pool would share its cores with the first, whose threads are busy for milliseconds behind every region of PyTorch's.
class Crew {
 public:
  using Work = void (*)(const void* context, int64_t part);

  explicit Crew(int64_t threads) : threads_(threads), ranges_(static_cast<size_t>(threads)) {}

  int64_t threads() const { return threads_; }

  // Calls work() in this thread, which has helpers meanwhile; it must not throw.
  template <class Caller>
  void gather(Caller work) {
#pragma omp parallel num_threads(threads_)
    {
      if (omp_get_thread_num()) {
        help(omp_get_thread_num());
      } else {
        work();
        dismiss(omp_get_num_threads() - 1);
      }
    }
  }

  // Calls work(context, part) for the parts 0 .. count - 1, which must not throw. With `own`, each thread has a range
  // of neighbours for its own, and goes on with the others' when it is through; else all take them in their order.
  // last: nothing is offered after it.
  void run(int64_t count, bool own, bool last, Work work, const void* context);

 private:
  // The parts that are left of a range, with the number of what was offered above them: a thread that saw an older
  // offer takes none.
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};
  };

  void help(int64_t place);
  void dismiss(int64_t helpers);
  bool take_from(int64_t range);
  // Takes parts until none is left, from the range `place` first; true where it took any.
  bool take(int64_t place);
  void wake();
  // Holds the caller until a count that others move has the value `last`.
  void wait(const std::atomic<int64_t>& count, int64_t last);
  // Tells the caller, where it may be asleep, that a count has changed.
  void tell();

  const int64_t threads_;
  std::vector<Range> ranges_;
  uint32_t offers_ = 0;  // counted by the caller
  // What is offered: written by the caller while no part is left, read by whoever then takes one.
  std::atomic<Work> work_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0}, used_{1};  // parts, and ranges that have any
  std::atomic<int64_t> unfinished_{0};
  std::atomic<int64_t> gone_{0};  // helpers that have left
  std::atomic<bool> last_{false}, dismissed_{false};
  std::atomic<uint64_t> news_{0};  // counts offers, for those who wait for one
  std::atomic<int64_t> asleep_{0};
  std::atomic<bool> caller_asleep_{false};
  std::mutex mutex_;
  std::condition_variable offered_, finished_;
};

}  // namespace den_kernels
