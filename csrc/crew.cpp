#include "crew.h"

#include <chrono>

namespace den_kernels {
namespace {

// How long a thread waits busily: about as long as it takes to be woken. Behind the last offer longer: the others are
// at their last parts, and wait then for whoever has to be woken.
constexpr std::chrono::microseconds busy{40}, busy_at_last{120};

// Leaves a core's resources to its other thread for some cycles.
void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Waits busily until done(); false where it did not come soon.
template <class Done>
bool soon(Done done, std::chrono::microseconds limit = busy) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      rest();
    }
  } while (std::chrono::steady_clock::now() - start < limit);
  return false;
}

}  // namespace

bool Crew::take_from(int64_t range) {
  std::atomic<uint64_t>& left = ranges_[static_cast<size_t>(range)].left;
  bool any = false;
  for (uint64_t seen = left.load(std::memory_order_acquire); seen & 0xFFFFFFFF;) {
    const Work work = work_.load(std::memory_order_relaxed);
    const void* context = context_.load(std::memory_order_relaxed);
    int64_t begin, end;
    share(count_.load(std::memory_order_relaxed), range, used_.load(std::memory_order_relaxed), begin, end);
    if (!left.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    work(context, end - static_cast<int64_t>(seen & 0xFFFFFFFF));  // the part is taken: what was read belongs to it
    any = true;
    if (unfinished_.fetch_sub(1) == 1) tell();
    seen = left.load(std::memory_order_acquire);
  }
  return any;
}

bool Crew::take(int64_t place) {
  bool any = false;
  for (int64_t i = 0; i < threads_; ++i) any |= take_from((place + i) % threads_);
  return any;
}

void Crew::help(int64_t place) {
  for (;;) {
    const uint64_t seen = news_;
    if (dismissed_) break;
    if (take(place) || soon([&] { return news_ != seen; }, last_ ? busy_at_last : busy)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    offered_.wait(lock, [&] { return news_ != seen; });
    --asleep_;
  }
  ++gone_;
  tell();
}

void Crew::dismiss(int64_t helpers) {
  dismissed_ = true;
  wake();
  wait(gone_, helpers);
}

void Crew::run(int64_t count, bool own, bool last, Work work, const void* context) {
  if (count < 1) return;
  last_ = last;
  const int64_t used = own ? threads_ : 1;
  const uint64_t offer = static_cast<uint64_t>(++offers_) << 32;
  work_ = work, context_ = context, count_ = count, used_ = used;
  unfinished_ = count;
  for (int64_t i = 0; i < used; ++i) {
    int64_t begin, end;
    share(count, i, used, begin, end);
    ranges_[static_cast<size_t>(i)].left.store(offer | static_cast<uint64_t>(end - begin), std::memory_order_release);
  }
  if (count > 1) wake();
  take(0);
  wait(unfinished_, 0);
}

void Crew::wake() {
  ++news_;
  if (!asleep_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  offered_.notify_all();
}

void Crew::wait(const std::atomic<int64_t>& count, int64_t last) {
  if (soon([&] { return count == last; })) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_asleep_ = true;
  finished_.wait(lock, [&] { return count == last; });
  caller_asleep_ = false;
}

void Crew::tell() {
  if (!caller_asleep_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  finished_.notify_one();
}

}  // namespace den_kernels
