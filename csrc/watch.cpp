#include "watch.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace den_kernels {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kWhole = 1024;  // lines that are summed in every call: 64 KB take about a microsecond
constexpr int64_t kGroup = 128;   // else lines of a group, each of which may come from main memory

int64_t lines_of(int64_t bytes) { return (bytes + kLine - 1) / kLine; }
int64_t groups_of(int64_t lines) { return lines <= kWhole ? 1 : (lines + kGroup - 1) / kGroup; }

// Sixteen sums side by side. Each step is a bijection of its sum, so that two memories that differ in one word differ
// in their sum.
constexpr uint32_t kOdd = 0x9E3779B1u;

DEN_KERNELS_CLONES void add_lines(const char* data, int64_t first, int64_t step, int64_t end, uint32_t* sums) {
  uint32_t local[16], words[16];
  std::memcpy(local, sums, sizeof local);
  for (int64_t line = first; line < end; line += step) {
    std::memcpy(words, data + line * kLine, kLine);
    for (int k = 0; k < 16; ++k) local[k] = (local[k] ^ words[k]) * kOdd;
  }
  std::memcpy(sums, local, sizeof local);
}

}  // namespace

Checksums::Checksums(const void* data, int64_t bytes) : bytes_(bytes), sums_(groups_of(lines_of(bytes))) {
  for (int64_t group = 0; group < groups(); ++group) sums_[group] = sum(data, group);
}

bool Checksums::next_holds(const void* data) {
  turn_ = (turn_ + 1) % sums_.size();
  return sums_[turn_] == sum(data, static_cast<int64_t>(turn_));
}

uint64_t Checksums::sum(const void* data, int64_t group) const {
  const char* bytes = static_cast<const char*>(data);
  const int64_t whole = bytes_ / kLine, rest = bytes_ % kLine;
  uint32_t sums[16] = {};
  add_lines(bytes, group, groups(), whole, sums);
  if (rest && whole % groups() == group) {
    char last[kLine] = {};
    std::memcpy(last, bytes + whole * kLine, rest);
    add_lines(last, 0, 1, 1, sums);
  }
  uint64_t mixed = 0;
  for (const uint32_t sum : sums) mixed = (mixed ^ sum) * 0x9E3779B97F4A7C15u;
  return mixed;
}

}  // namespace den_kernels
