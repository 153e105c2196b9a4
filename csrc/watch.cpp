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

// Sixteen sums side by side, in four chains of every fourth line: a product takes ten cycles, and four hide it. Each
// step is a bijection of its sum, so that two memories that differ in one word differ in their sum.
constexpr uint32_t kOdd = 0x9E3779B1u;
constexpr int kChains = 4;
struct Sums {
  uint32_t of[kChains][16] = {};
};

DEN_KERNELS_CLONES void add_lines(const char* data, int64_t first, int64_t step, int64_t end, Sums& sums) {
  Sums local = sums;
  uint32_t words[16];
  int64_t line = first;
  for (; line + (kChains - 1) * step < end; line += kChains * step)
    for (int c = 0; c < kChains; ++c) {
      std::memcpy(words, data + (line + c * step) * kLine, kLine);
      for (int k = 0; k < 16; ++k) local.of[c][k] = (local.of[c][k] ^ words[k]) * kOdd;
    }
  for (; line < end; line += step) {
    std::memcpy(words, data + line * kLine, kLine);
    for (int k = 0; k < 16; ++k) local.of[0][k] = (local.of[0][k] ^ words[k]) * kOdd;
  }
  sums = local;
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
  Sums sums;
  add_lines(bytes, group, groups(), whole, sums);
  if (rest && whole % groups() == group) {
    char last[kLine] = {};
    std::memcpy(last, bytes + whole * kLine, rest);
    add_lines(last, 0, 1, 1, sums);
  }
  uint64_t mixed = 0;
  for (const auto& chain : sums.of)
    for (const uint32_t sum : chain) mixed = (mixed ^ sum) * 0x9E3779B97F4A7C15u;
  return mixed;
}

}  // namespace den_kernels
