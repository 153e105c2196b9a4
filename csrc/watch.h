// Whether tensors still hold what they held: the key of what was folded or packed from them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace den_kernels {

// A tensor's memory, cut into lines of 64 bytes. The lines are dealt out to groups in turn, so that each group spreads
// over the whole: one of a few lines tells of a change of most of them, and all groups one after the other of any.
// Where the memory is small there is one group.
class Checksums {
 public:
  Checksums(const void* data, int64_t bytes);
  // Whether the group whose turn it is still has its sum.
  bool next_holds(const void* data);
  int64_t groups() const { return static_cast<int64_t>(sums_.size()); }

 private:
  uint64_t sum(const void* data, int64_t group) const;

  int64_t bytes_;
  size_t turn_ = 0;
  std::vector<uint64_t> sums_;  // [groups]
};

}  // namespace den_kernels
