#include "crew.h"

#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "openmp.h"

namespace den_kernels {
namespace {

using Clock = std::chrono::steady_clock;
// How long a thread waits busily. Between the layers of a network only about as long as it takes to be woken: whoever
// it waits for may need its core, where another process has taken the other's. Else as long as a program takes from one
// call of ours to the next.
constexpr std::chrono::microseconds busy_in_layers{40}, busy_else{200};

// Leaves a core's resources to its other thread for some cycles.
void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Waits busily until done(), but no longer than most(); false where it did not come.
template <class Most, class Done>
bool soon(Most most, Done done) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      rest();
    }
  } while (Clock::now() - start < most());
  return false;
}

// The crews that nobody has. Neither they nor their threads end before the process does.
struct Idle {
  std::mutex mutex;
  std::vector<Crew*> crews;
};

Idle*& idle() {
  static Idle* found = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { idle() = new Idle; });  // a child has none of its parent's threads
#endif
    return new Idle;
  }();
  return found;
}

}  // namespace

Crew* Crew::lend(int64_t threads) {
  Idle& all = *idle();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (size_t i = all.crews.size(); i-- > 0;) {
      Crew* crew = all.crews[i];
      if (crew->threads_ != threads) continue;
      all.crews.erase(all.crews.begin() + static_cast<int64_t>(i));
      return crew;
    }
  }
  return new Crew(threads);
}

void Crew::give_back(Crew* crew) {
  crew->in_layers_ = false;
  Idle& all = *idle();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.crews.push_back(crew);
}

Crew::Crew(int64_t threads) : threads_(threads), ranges_(static_cast<size_t>(threads)) {
  for (int64_t place = 1; place < threads; ++place) {
    try {
      std::thread([this, place] { help(place); }).detach();
    } catch (const std::system_error&) {  // there are as many as the system has
      break;
    }
  }
}

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
    if (unfinished_.fetch_sub(1) == 1 && caller_asleep_) {
      const std::lock_guard<std::mutex> lock(mutex_);
      finished_.notify_one();
    }
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
  omp_set_num_threads(1);  // of regions in a part
  for (;;) {
    const uint64_t seen = news_;
    if (take(place) || soon([&] { return busy(); }, [&] { return news_ != seen; })) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    offered_.wait(lock, [&] { return news_ != seen; });
    --asleep_;
  }
}

void Crew::run(int64_t count, bool own, Work work, const void* context) {
  if (count < 1) return;
  const int64_t used = own ? threads_ : 1;
  in_layers_ = own;
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
  wait();
}

std::chrono::microseconds Crew::busy() const { return in_layers_ ? busy_in_layers : busy_else; }

void Crew::wake() {
  ++news_;
  if (!asleep_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  offered_.notify_all();
}

void Crew::wait() {
  if (soon([&] { return busy(); }, [&] { return unfinished_ == 0; })) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_asleep_ = true;
  finished_.wait(lock, [&] { return unfinished_ == 0; });
  caller_asleep_ = false;
}

}  // namespace den_kernels
