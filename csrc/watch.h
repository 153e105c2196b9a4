// Checksums that tell whether tensors still hold the values from which weights were folded or packed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace den_kernels {

// A tensor's memory, cut into lines of 64 bytes. The lines are dealt out to groups in turn, so that each group spreads
// over the whole. One group's sum shows a change of most of the memory; the groups one after the other show any change.
// Small memory is one group.
class Checksums {
 public:
  Checksums(const void* data, int64_t bytes);
  // True where the group whose turn it is still has its sum.
  bool next_holds(const void* data);
  int64_t groups() const { return static_cast<int64_t>(sums_.size()); }

 private:
  uint64_t sum(const void* data, int64_t group) const;

  int64_t bytes_;
  size_t turn_ = 0;
  std::vector<uint64_t> sums_;  // [groups]
};

}  // namespace den_kernels
