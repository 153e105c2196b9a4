// Runs CUDA kernels as C++ on a CPU: one fiber per CUDA thread, one block after the other, under sanitizers.
//
// A warp-wide operation runs when the last lane arrives and writes every lane's result; a block barrier opens when the
// last thread arrives. Nothing else switches fibers, so a run is deterministic. What a GPU leaves open, `schedule`
// chooses: the order of the threads, and whether an asynchronous copy lands when it is issued or when it is waited for.
// A kernel with a missing barrier or a ring that is one stage short gives other results under one of them. Shared
// memory is as large as the launch asked, no byte more, and starts as NaN.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace shim {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 96 << 10;

struct Schedule {
  bool backward = false;  // the highest thread runs first
  bool lazy = false;      // an asynchronous copy lands at the wait that needs it
};
struct Copy {
  void* to;
  const void* from;
};
enum class State { ready, waits_for_warp, waits_for_block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack;
  State state;
  void* operand;                          // what this lane brought to the warp's operation
  std::vector<Copy> issued;               // copies not yet committed
  std::deque<std::vector<Copy>> commits;  // groups that have not landed
};
struct Index {
  unsigned x;
};

inline Schedule schedule;
inline std::vector<Fiber> fibers;
inline ucontext_t host;
inline int current, live;
inline Index block_index, block_size, grid_size;
inline std::unique_ptr<unsigned char[]> shared;
inline std::function<void()> body;
inline int64_t bytes_streamed, bytes_loaded, bytes_stored;  // of global memory: by asynchronous copies, loads, stores
inline const void* host_stack;
inline std::size_t host_stack_size;

inline void switch_to(int next) {  // -1: back to the host
  Fiber& from = fibers[current];
  void** saved = from.state == State::done ? nullptr : &from.fake_stack;
  current = next;
  if (next < 0) {
    __sanitizer_start_switch_fiber(saved, host_stack, host_stack_size);
    swapcontext(&from.context, &host);
  } else {
    __sanitizer_start_switch_fiber(saved, fibers[next].stack.get(), kStack);
    swapcontext(&from.context, &fibers[next].context);
  }
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// The next thread that can run, in the schedule's order.
inline void yield() {
  const int n = static_cast<int>(fibers.size()), step = schedule.backward ? n - 1 : 1;
  for (int i = (current + step) % n, tries = 0; tries < n; ++tries, i = (i + step) % n)
    if (fibers[i].state == State::ready) {
      if (i != current) switch_to(i);
      return;
    }
  if (live == 0) return switch_to(-1);
  std::fprintf(stderr, "cuda_shim: deadlock in block %u: threads wait at barriers that others do not reach\n",
               block_index.x);
  std::abort();
}

inline void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  body();
  fibers[current].state = State::done;
  --live;
  yield();
}

inline void start_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  __asan_unpoison_memory_region(fiber.stack.get(), kStack);
  fiber.state = State::ready;
  fiber.fake_stack = nullptr;
  fiber.issued.clear();
  fiber.commits.clear();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
}

inline void run_block(int threads) {
  fibers.resize(threads);
  for (Fiber& fiber : fibers) start_fiber(fiber);
  live = threads;
  current = schedule.backward ? threads - 1 : 0;
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, fibers[current].stack.get(), kStack);
  swapcontext(&host, &fibers[current].context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Waits until `count` fibers from `first` stand at the same barrier; the last one runs `operation`.
template <class Operation>
void meet(int first, int count, State waiting, Operation operation) {
  fibers[current].state = waiting;
  for (int i = first; i < first + count; ++i)
    if (fibers[i].state != waiting) return yield();
  operation();
  for (int i = first; i < first + count; ++i) fibers[i].state = State::ready;
}

inline int lane() { return current % kWarp; }

// A warp-wide operation: `operation(lanes)` sees and fills the 32 operands.
template <class Operand, class Operation>
void collective(Operand& operand, Operation operation) {
  const int first = current / kWarp * kWarp;
  fibers[current].operand = &operand;
  meet(first, kWarp, State::waits_for_warp, [&] {
    Operand* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<Operand*>(fibers[first + i].operand);
    operation(lanes);
  });
}

template <class Params>
void launch(void (*kernel)(Params), int blocks, int threads, std::size_t shared_bytes, const Params& params) {
  grid_size.x = static_cast<unsigned>(blocks);
  block_size.x = static_cast<unsigned>(threads);
  body = [=] { kernel(params); };
  for (int i = 0; i < blocks; ++i) {
    block_index.x = static_cast<unsigned>(i);
    shared.reset(new unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xFF, shared_bytes);
    run_block(threads);
  }
}

}  // namespace shim

#define threadIdx (shim::Index{static_cast<unsigned>(shim::current)})
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
