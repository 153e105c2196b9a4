// Code that the direct blocks share: it cuts a batch into chunks of instances and shares these out among the threads.
//
// A kernel defines a Chunk (start, count, scratch, block; bytes()) and its stages: those functions of run_chunk that
// differ, or the ones they call:  clear_maps(chunk, begin, end)  for instances,  activate_row(chunk, instance, row),
// hidden_items(chunk, begin, end)  and  output_items(chunk, begin, end)  of hidden_count() and output_count() items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include <unistd.h>

#include "check.h"
#include "direct_channels.h"
#include "dispatch.h"
#include "numbers.h"
#include "openmp.h"
#include "parallel.h"

namespace den_kernels {

constexpr int64_t max_taps = 49;
constexpr int64_t chunk_pixels = 1024;  // input pixels of a chunk: enough to hide the time that loading weights takes
// Bytes that the maps of a chunk may take: half of a core's second-level cache.
inline int64_t scratch_bytes() {
  constexpr int64_t usual = 1 << 20;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t half = sysconf(_SC_LEVEL2_CACHE_SIZE) / 2;
  return half > 0 ? std::min(std::max(half, usual / 4), 2 * usual) : usual;
#else
  return usual;
#endif
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch memory of a thread, kept between calls: fresh pages would cost more than the smallest blocks.
inline void* scratch_of_thread(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t held = 0;
  if (bytes > held) {
    memory.reset();
    held = 0;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
    if (!memory) throw std::bad_alloc();
    held = bytes;
  }
  return memory.get();
}

// Words from a pixel to the next, for maps of so many channels: with a multiple of eight cache lines, neighbouring
// pixels would share few sets of the first-level cache.
inline int64_t spread(int64_t words) { return words && words % 128 == 0 ? words + 16 : words; }

// The largest piece of the `rest` of the work: half of a thread's share, so that pieces are large while much is left
// and threads end together.
inline int64_t fair_share(int64_t rest, int64_t threads) { return std::max<int64_t>(1, rest / (2 * threads)); }

// The factor by which a chunk may grow: as often as its maps fit scratch memory and its input fits chunk_pixels.
template <class Chunk>
int64_t times_fitting(const Chunk& c) {
  return std::min(scratch_bytes() / c.bytes(1), chunk_pixels / (c.count * c.block.H * c.block.W));
}

// The chunks of a route, heavy first. Few instances of large weights go together, so that weights are read once; counts
// are below `multiple` or divisible by it. make(start, count, hidden[s]) gives a chunk. A team shares each chunk.
template <class Arguments, class Make>
auto make_chunks(const Arguments& b, const std::vector<Channels>& hidden, int64_t threads, int64_t multiple,
                 Make make) {
  std::vector<decltype(make(0, 1, hidden[0]))> chunks;
  int64_t rest = 0;  // instances times width
  for (int64_t s = 0; s < b.route.S; ++s) rest += b.route.count(s) * hidden[s].count;
  for (int64_t s = 0; s < b.route.S; ++s) {
    if (!hidden[s].count) continue;
    const int64_t last = b.route.offsets[s + 1], fits = times_fitting(make(0, multiple, hidden[s])) * multiple;
    for (int64_t i = b.route.offsets[s]; i < last;) {
      const int64_t share = Team::current() ? last - i : fair_share(rest / hidden[s].count, threads);
      const int64_t left = std::min({std::max(fits, multiple), round_up(share, multiple), last - i});
      const int64_t count = left > multiple ? left / multiple * multiple : left;
      chunks.push_back(make(i, count, hidden[s]));
      rest -= count * hidden[s].count;
      i += count;
    }
  }
  return chunks;
}

// The input map, activated and padded, in scratch memory.
template <class Chunk>
void input_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.count, thread, threads, begin, end);
  clear_maps(c, begin, end);
  share(c.count * c.block.H, thread, threads, begin, end);
  for (int64_t i = begin; i < end; ++i) activate_row(c, i / c.block.H, i % c.block.H);
}

// The hidden map.
template <class Chunk>
void hidden_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.hidden_count(), thread, threads, begin, end);
  hidden_items(c, begin, end);
}

// A stage between the hidden map and the output: kernels that have one overload both functions.
template <class Chunk>
bool has_middle(const Chunk&) {
  return false;
}
template <class Chunk>
void middle_stage(const Chunk&, int64_t, int64_t) {}

// The output.
template <class Chunk>
void output_stage(const Chunk& c, int64_t thread, int64_t threads) {
  int64_t begin, end;
  share(c.output_count(), thread, threads, begin, end);
  output_items(c, begin, end);
}

// Parts of a stage for each thread of a team; kernels overload it where a part has memory of its own, or reads what
// others read, too.
template <class Chunk>
int64_t parts_for_each(const Chunk&) {
  return parts_of_thread;
}

// One chunk in stages: each(stage) calls stage(part, parts) for all parts that it makes of one.
template <class Chunk, class Each>
void run_chunk(const Chunk& c, Each each) {
  each([&](int64_t part, int64_t parts) { input_stage(c, part, parts); });
  each([&](int64_t part, int64_t parts) { hidden_stage(c, part, parts); });
  if (has_middle(c)) each([&](int64_t part, int64_t parts) { middle_stage(c, part, parts); });
  each([&](int64_t part, int64_t parts) { output_stage(c, part, parts); });
}

// All chunks, one after the other by all threads of a team together; and `rest_count` times `rest`.
template <class Chunk, class Rest>
void run_together(Team& team, std::vector<Chunk>& chunks, int64_t rest_count, Rest rest) {
  share_items(rest_count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rest(i);
  });
  for (Chunk& chunk : chunks) {
    const int64_t parts = team.threads() * parts_for_each(chunk);
    chunk.scratch = static_cast<decltype(Chunk::scratch)>(scratch_of_thread(chunk.bytes(parts)));
    run_chunk(chunk, [&](auto stage) { team.run_parts(parts, [&](int64_t part) { stage(part, parts); }); });
  }
}

// All chunks: shared out among the threads where there are enough of them, else one after the other by all together;
// and `rest_count` times `rest`, small work that lets threads end together.
template <class Chunk, class Rest>
void run_chunks(std::vector<Chunk> chunks, int64_t threads, int64_t rest_count, Rest rest) {
  using Scratch = decltype(Chunk::scratch);
  if (Team* team = Team::current()) return run_together(*team, chunks, rest_count, rest);
  const int64_t count = static_cast<int64_t>(chunks.size());
  if (count < 2 * threads && threads > 1)
    return Team::run(threads, [&] { run_together(*Team::current(), chunks, rest_count, rest); });
  share_out(count + rest_count, threads, [&](int64_t i) {
    if (i >= count) return rest(i - count);
    chunks[i].scratch = static_cast<Scratch>(scratch_of_thread(chunks[i].bytes(1)));
    run_chunk(chunks[i], [](auto stage) { stage(0, 1); });
  });
}

template <class Arguments>
void check_block(const Arguments& b) {
  check(b.C % 16 == 0 && b.C_out % 16 == 0, "dynamic_residual", "channels", "divisible by 16",
        b.C % 16 ? b.C : b.C_out);
  check(b.R % 2 && b.S % 2 && b.R * b.S <= max_taps, "dynamic_residual", "kernel", "odd and at most 7 x 7", b.R * b.S);
}

// The least value of a block's output: 0 behind a ReLU.
template <class Arguments>
float least_of(const Arguments& b) {
  return b.relu ? 0.f : -std::numeric_limits<float>::infinity();
}

// The instances that have no branch, and so only a shortcut to copy, or its ReLU; none where it lies there already.
template <class Arguments>
std::vector<int64_t> without_branch(const Arguments& b, const std::vector<Channels>& hidden) {
  std::vector<int64_t> found;
  for (int64_t s = 0; s < b.route.S && b.shortcut != b.out; ++s)
    for (int64_t i = b.route.offsets[s]; i < b.route.offsets[s + 1] && !hidden[s].count; ++i)
      found.push_back(b.route.order[i]);
  return found;
}

// relu(from) into `to`, which may be the same; a NaN passes.
inline void copy_relu(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] < 0.f ? 0.f : from[i];
}
inline void copy_relu(const bf16* from, bf16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]) < 0.f ? bf16{} : from[i];
}

// Runs all instances of a block; make as for make_chunks.
template <class Arguments, class Make>
void run_instances(const Arguments& b, const std::vector<Channels>& hidden, int64_t threads, int64_t multiple,
                   Make make) {
  const std::vector<int64_t> rest = without_branch(b, hidden);
  const int64_t size = b.Ho * b.Wo * b.C_out;
  run_chunks(make_chunks(b, hidden, threads, multiple, make), threads, static_cast<int64_t>(rest.size()),
             [&](int64_t i) {
               const auto* from = b.shortcut + rest[i] * size;
               auto* to = b.out + rest[i] * size;
               if (b.relu)
                 copy_relu(from, to, size);
               else
                 std::memcpy(to, from, size * sizeof(*to));
             });
}

// Runs the whole block. block: the channels that the kernel takes together; make as for make_chunks.
template <class Arguments, class Make>
void run_block(const Arguments& b, int64_t block, int64_t multiple, Make make) {
  check_block(b);
  run_instances(b, channels_of(b.route, b.sizes, b.M, block), omp_get_max_threads(), multiple, make);
}

}  // namespace den_kernels
