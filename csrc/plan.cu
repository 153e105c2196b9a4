// The routing plan of all N blocks in one launch, one CUDA block for each: stable counting sorts that never leave it.
//
// A warp owns a range of consecutive places. It counts its instances of each segment, the counts are added up over
// segments and warps, and the warp walks its range again and puts each instance where its own counter says. Lanes of
// one segment take their rank among each other from the match instruction, so nothing depends on which thread comes
// first.
#include "check.h"
#include "cuda_ops.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace den_kernels {
namespace {

constexpr int kWarps = 32, kThreads = 32 * kWarps;
constexpr int kColumn = kWarps + 1;  // counters of a segment, padded against bank conflicts
constexpr int kDigit = 5;            // bits of a mask that one sort orders

template <class T>
struct LevelsArguments {
  const T* levels;  // [B, N]
  int64_t stride_b, stride_n;
  int B, G;
  Plan plan;
};
struct MasksArguments {
  const uint8_t* masks;  // [N, B, G]
  int B, G;
  Plan plan;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// The places that this warp owns.
struct Range {
  int begin, end;
};
__device__ __forceinline__ Range range_of_warp(int B) {
  const int span = (B + kThreads - 1) / kThreads * 32;
  const int begin = warp_id() * span;
  return {begin < B ? begin : B, begin + span < B ? begin + span : B};
}

__device__ __forceinline__ int inclusive_scan(int v) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const int below = shuffle_up(v, delta);
    if (lane_id() >= delta) v += below;
  }
  return v;
}

// counts [S, kColumn] of warps -> where each warp's first instance of each segment goes; starts [S + 1] of segments.
__device__ void add_up(int S, int* counts, int* starts) {
  sync_block();
  for (int s = warp_id(); s < S; s += kWarps) {
    const int count = counts[s * kColumn + lane_id()], sum = inclusive_scan(count);
    counts[s * kColumn + lane_id()] = sum - count;
    if (lane_id() == 31) starts[s + 1] = sum;
  }
  sync_block();
  if (warp_id() == 0) {
    int carry = 0;
    for (int s = 0; s < S; s += 32) {
      const int place = s + lane_id() + 1;
      const int sum = carry + inclusive_scan(place <= S ? starts[place] : 0);
      if (place <= S) starts[place] = sum;
      carry = shuffle(sum, 31);
    }
    if (lane_id() == 0) starts[0] = 0;
  }
  sync_block();
}

// Sorts instances stably by segment, ascending: `from` [B] (null: 0, 1, 2, ...) to `to` [B]. Fills starts [S + 1].
template <class Segment>
__device__ void sort(int B, int S, Segment segment, const int32_t* from, int32_t* to, int* counts, int* starts) {
  const Range range = range_of_warp(B);
  for (int i = static_cast<int>(threadIdx.x); i < S * kColumn; i += kThreads) counts[i] = 0;
  sync_block();
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = range.begin; i < range.end; i += 32) {
      const int place = i + lane_id();
      const int b = place >= range.end ? -1 : from ? from[place] : place;
      const int s = b < 0 ? -1 : segment(b);
      const uint32_t peers = match_any(s), before = peers & ((1u << lane_id()) - 1);
      int* count = counts + s * kColumn + warp_id();
      if (pass == 1 && s >= 0) to[starts[s] + *count + count_bits(before)] = b;
      sync_warp();
      if (s >= 0 && before == 0) *count += count_bits(peers);
      sync_warp();
    }
    if (pass == 0) add_up(S, counts, starts);
  }
  sync_block();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) plan_levels_kernel(LevelsArguments<T> arguments) {
  const int64_t n = blockIdx.x, B = arguments.B;
  const int G = arguments.G;
  int32_t* levels = arguments.plan.levels + n * B;
  int* counts = reinterpret_cast<int*>(shared_memory());
  int* starts = counts + (G + 1) * kColumn;
  const Range range = range_of_warp(arguments.B);
  for (int b = range.begin + lane_id(); b < range.end; b += 32) {
    const T level = arguments.levels[b * arguments.stride_b + n * arguments.stride_n];
    levels[b] = level < 0 ? 0 : level > G ? G : static_cast<int32_t>(level);
  }
  const auto segment = [=](int b) { return G - levels[b]; };  // what this thread wrote
  sort(arguments.B, G + 1, segment, nullptr, arguments.plan.order + n * B, counts, starts);
  int32_t* offsets = arguments.plan.offsets + n * (G + 2);
  for (int s = static_cast<int>(threadIdx.x); s < G + 2; s += kThreads) offsets[s] = starts[s];
}

// words [B] of one block's masks, sorted in `order`: where they change, and B behind that.
__device__ void write_segments(int B, const int32_t* words, const int32_t* order, int32_t* offsets, int* counts,
                               int* starts) {
  const Range range = range_of_warp(B);
  const auto changes = [=](int i) { return i < range.end && (i == 0 || words[order[i]] != words[order[i - 1]]); };
  int found = 0;
  for (int i = range.begin; i < range.end; i += 32) found += count_bits(ballot(changes(i + lane_id())));
  if (lane_id() == 0) counts[warp_id()] = found;
  add_up(1, counts, starts);
  int s = counts[warp_id()];
  for (int i = range.begin; i < range.end; i += 32) {
    const bool change = changes(i + lane_id());
    const uint32_t vote = ballot(change);
    if (change) offsets[s + count_bits(vote & ((1u << lane_id()) - 1))] = i + lane_id();
    s += count_bits(vote);
  }
  for (int i = starts[1] + static_cast<int>(threadIdx.x); i <= B; i += kThreads) offsets[i] = B;
}

// Sorts by the mask, least significant digit first, then by the number of groups. The words stand in `levels`
// meanwhile, every other order in `offsets`.
__global__ void __launch_bounds__(kThreads, 1) plan_masks_kernel(MasksArguments arguments) {
  const int64_t n = blockIdx.x, B = arguments.B;
  const int G = arguments.G, digits = (G + kDigit - 1) / kDigit;
  int32_t* words = arguments.plan.levels + n * B;
  int32_t* order = arguments.plan.order + n * B;
  int32_t* offsets = arguments.plan.offsets + n * (B + 1);
  int* counts = reinterpret_cast<int*>(shared_memory());
  int* starts = counts + kColumn * (kPlanMaskGroups + 1);
  for (int b = static_cast<int>(threadIdx.x); b < B; b += kThreads) {
    const uint8_t* mask = arguments.masks + (n * B + b) * G;
    uint32_t word = 0;
    for (int g = 0; g < G; ++g) word = word << 1 | (mask[g] != 0);  // words compare as masks do
    words[b] = static_cast<int32_t>(word);
  }
  sync_block();
  const int32_t* from = nullptr;
  for (int digit = 0; digit < digits; ++digit) {
    int32_t* to = (digits - digit) % 2 ? offsets : order;
    const auto segment = [=](int b) {
      return 31 - static_cast<int>(static_cast<uint32_t>(words[b]) >> digit * kDigit & 31);
    };
    sort(arguments.B, 32, segment, from, to, counts, starts);
    from = to;
  }
  const auto segment = [=](int b) { return G - count_bits(static_cast<uint32_t>(words[b])); };
  sort(arguments.B, G + 1, segment, from, order, counts, starts);
  write_segments(arguments.B, words, order, offsets, counts, starts);
  sync_block();
  for (int b = static_cast<int>(threadIdx.x); b < B; b += kThreads)
    words[b] = count_bits(static_cast<uint32_t>(words[b]));
}

std::size_t table_bytes(int64_t S) { return sizeof(int) * static_cast<std::size_t>(S * kColumn + S + 1); }

void check_sizes(const char* op, int64_t B, int64_t N, int64_t G, int64_t most_groups) {
  check(B >= 0 && B < 1 << 30, op, "B", "in 0..2^30", B);
  check(N >= 0 && N < 1 << 30, op, "N", "in 0..2^30", N);
  check(G >= 1 && G <= most_groups, op, "G", ("in 1.." + std::to_string(most_groups)).c_str(), G);
}

}  // namespace

template <class T>
void plan_levels_cuda(const T* levels, int64_t stride_b, int64_t stride_n, int64_t B, int64_t N, int64_t G, Plan plan,
                      void* stream) {
  check_sizes("plan_levels_cuda", B, N, G, kPlanGroups);
  if (N == 0) return;
  const LevelsArguments<T> arguments = {levels, stride_b, stride_n, static_cast<int>(B), static_cast<int>(G), plan};
  launch("plan_levels_cuda", plan_levels_kernel<T>, static_cast<int>(N), kThreads, table_bytes(G + 1), stream,
         arguments);
}

template void plan_levels_cuda(const int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t, Plan, void*);
template void plan_levels_cuda(const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, Plan, void*);

#ifdef __CUDACC__
const void* plan_kernel_cuda() { return reinterpret_cast<const void*>(&plan_levels_kernel<int32_t>); }
#endif

void plan_masks_cuda(const uint8_t* masks, int64_t B, int64_t N, int64_t G, Plan plan, void* stream) {
  check_sizes("plan_masks_cuda", B, N, G, kPlanMaskGroups);
  if (N == 0) return;
  const MasksArguments arguments = {masks, static_cast<int>(B), static_cast<int>(G), plan};
  launch("plan_masks_cuda", plan_masks_kernel, static_cast<int>(N), kThreads, table_bytes(kPlanMaskGroups + 1), stream,
         arguments);
}

}  // namespace den_kernels
