// The part of GNU's OpenMP runtime that csrc calls, on plain threads, so that the thread sanitizer sees all that they
// do: of GNU's own, which is built without it, it reports races where there are none. A region makes its threads anew.
#include <dlfcn.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

struct Loop {
  long next, end, increment, chunk;
};

struct Team {
  unsigned threads;
  std::mutex mutex;
  std::condition_variable changed;
  unsigned come = 0, turn = 0;
  std::map<int, Loop> loops;    // by their place in the region
  std::map<int, bool> singles;  // likewise, those that a thread has taken

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned before = turn;
    if (++come == threads) {
      come = 0, ++turn;
      changed.notify_all();
    }
    changed.wait(lock, [&] { return turn != before; });
  }
};

struct Self {
  Team* team = nullptr;
  unsigned thread = 0;
  int loop = 0, single = 0;  // how many of them this thread has met in its region
};
thread_local Self self;
thread_local int asked = 0;  // threads of this thread's regions, where no other runtime knows it

// The function of the runtime that torch brings, or null: torch.set_num_threads tells it how many threads to use.
template <class Function>
Function of_torch(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

bool take(Loop& loop, long* first, long* last) {
  if (loop.next >= loop.end) return false;
  *first = loop.next;
  *last = loop.next = std::min(loop.end, loop.next + loop.chunk * loop.increment);
  return true;
}

}  // namespace

#define HIDDEN extern "C" __attribute__((visibility("hidden")))

HIDDEN int omp_get_max_threads() {
  if (self.team) return 1;  // regions within regions have one thread
  static const auto torchs = of_torch<int (*)()>("omp_get_max_threads");
  return asked ? asked : torchs ? torchs() : 4;
}
HIDDEN void omp_set_num_threads(int threads) {
  static const auto torchs = of_torch<void (*)(int)>("omp_set_num_threads");
  if (torchs)
    torchs(threads);
  else
    asked = threads;
}
HIDDEN int omp_get_thread_num() { return static_cast<int>(self.thread); }
HIDDEN int omp_get_num_threads() { return self.team ? static_cast<int>(self.team->threads) : 1; }

HIDDEN void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  Team team;
  team.threads = self.team ? 1 : threads ? threads : static_cast<unsigned>(omp_get_max_threads());
  const Self outside = self;
  std::vector<std::thread> others;
  for (unsigned i = 1; i < team.threads; ++i)
    others.emplace_back([&team, work, data, i] {
      self = {&team, i};
      work(data);
    });
  self = {&team, 0};
  work(data);
  for (std::thread& other : others) other.join();
  self = outside;
}
HIDDEN void GOMP_barrier() {
  if (self.team) self.team->wait();
}
HIDDEN bool GOMP_single_start() {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  return !std::exchange(self.team->singles[self.single++], true);
}
HIDDEN bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long increment, long chunk, long* first,
                                                 long* last) {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  return take(self.team->loops.try_emplace(self.loop, Loop{start, end, increment, chunk}).first->second, first, last);
}
HIDDEN bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  const std::lock_guard<std::mutex> lock(self.team->mutex);
  return take(self.team->loops.at(self.loop), first, last);
}
HIDDEN void GOMP_loop_end_nowait() { ++self.loop; }
