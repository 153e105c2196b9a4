// Exceptions in parallel regions. One that leaves an OpenMP region ends the process: work that may throw (it takes
// memory) runs through a Failure, which keeps the first exception until the region is over.
#pragma once

#include <atomic>
#include <exception>

namespace den_kernels {

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

}  // namespace den_kernels
