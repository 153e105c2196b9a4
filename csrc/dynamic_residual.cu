// The residual block at inference on a GPU, in one launch; the hidden map never leaves the chip.
//
// A thread block owns whole instances, so the block is safe in place: what it reads of the old map lies in shared
// memory before it writes, and no other thread block reads that instance. A map that does not fit is taken in bands of
// rows; the rows that two bands share are moved, not read again. Hidden channels are made in slices and consumed at
// once:
//
//   for each band:   rows of x -> bn1, ReLU -> shared
//     for each slice of the instance's width:
//       conv1: [hidden pixels, 9 C] x [9 C, slice]  -> bn2, ReLU -> shared      (weights stream through a ring)
//       conv2: [pixels, 9 slice] x [9 slice, C_out] -> added up in registers
//     out += that
//
// Pixels outside a map are a row of zeros, so no tap is tested in the inner loop. Budget of a thread, 256 of them and
// one block on a multiprocessor: 128 registers for conv2's sums (a warp: 64 pixels x 64 channels), 32 for conv1's
// (64 x 16), the rest for fragments and addresses. At full width in bfloat16, 151 MFLOP an instance:
//
//   C x H x W      at a time  activations  hidden slice  ring   weights from L2 per instance  FLOP per byte of them
//   64 x 32 x 32   14 rows    83 KB        25 KB (16)    58 KB  0.44 MB                       341
//   128 x 16 x 16  1 map      70 KB        20 KB (32)    31 KB  0.59 MB                       256
//   256 x 8 x 8    2 maps     68 KB        18 KB (64)    61 KB  1.18 MB (2.36 with 1 map)     128 (64)
//
// 64 FLOP per byte asks 12 TB/s of an H200's L2 at its 790 TFLOP/s, more than it has: small batches of small maps are
// bound there.
#include "fused_multiply.cuh"
#include "fused_weights.cuh"
#include "launch.cuh"

namespace den_kernels {
namespace {

// hidden = relu(sums * scale2 + bias1) for the slice's channels from m.
template <class E>
DEN_KERNELS_DEVICE void write_hidden(const FusedResidual& p, const float (&sums)[kHiddenFragments][2][4], uint32_t to,
                                     int row, int fragment, int fragments, int pixels, int m) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int c = 8 * n + lane % 4 * 2;
    const float scale[2] = {p.scale2[m + c], p.scale2[m + c + 1]}, bias[2] = {p.bias1[m + c], p.bias1[m + c + 1]};
#pragma unroll
    for (int i = 0; i < kHiddenFragments; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int q = (fragment + i * fragments) * 16 + lane / 4 + 8 * half;
        const float lo = fmaf(sums[i][n][2 * half], scale[0], bias[0]);
        const float hi = fmaf(sums[i][n][2 * half + 1], scale[1], bias[1]);
        if (q < pixels) store_shared(to + q * row + c * E::bytes, operand(E{}, Float2{relu(lo), relu(hi)}));
      }
  }
}

// out += sums + bias2, then ReLU where the block has one behind.
template <class E>
__device__ void add_to_output(const FusedResidual& p, const Tile& tile, int y0,
                              const float (&sums)[kOutputFragments][2 * kOutputPairs][4]) {
  const Band band = band_at(p, y0);
  const int columns = p.layout.columns, lane = lane_id(), warp = warp_id(), column = warp % columns;
  const int of_map = here((band.y1 - band.y0) * p.Wo);
#pragma unroll
  for (int i = 0; i < kOutputFragments; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int fragment = warp / columns + i * (kFusedWarps / columns);
      const int q = fragment * 16 + lane / 4 + 8 * half, t = q / of_map;
      if (t >= tile.count) continue;
      const int64_t pixel = (static_cast<int64_t>(p.order[tile.first + t]) * p.Ho + band.y0) * p.Wo + q % of_map;
      unsigned char* row = static_cast<unsigned char*>(p.out) + pixel * p.C_out * E::bytes;
#pragma unroll
      for (int n = 0; n < 2 * kOutputPairs; ++n) {
        const int c = (column + n / 2 * columns) * 16 + n % 2 * 8 + lane % 4 * 2;
        if (c >= p.C_out) continue;
        Float2 v = unpack(E{}, load_global<typename E::Pair>(row + c * E::bytes));
        v = {v.lo + sums[i][n][2 * half], v.hi + sums[i][n][2 * half + 1]};
        if (p.bias2) v = {v.lo + p.bias2[c], v.hi + p.bias2[c + 1]};
        if (p.relu) v = {relu(v.lo), relu(v.hi)};
        store_global(row + c * E::bytes, pack(E{}, v));
      }
    }
}

// One slice of hidden channels: made from the activations, written to shared memory.
template <class E>
DEN_KERNELS_DEVICE void make_hidden(const Arguments& arguments, const Tile& tile, int y0, int m0, Ring<E>& ring) {
  const FusedResidual& p = arguments.block;
  const FusedShared& s = arguments.shared;
  const Band band = band_at(p, y0);
  const Source act = {shared_address() + s.act, s.act_row, p.H, p.W, band.r0, s.in_rows * p.W, p.stride};
  const FusedLayout& l = p.layout;
  const int lane = lane_id(), warp = warp_id();
  const int fragments = kFusedWarps / l.hidden_columns, fragment = warp / l.hidden_columns;
  const int column = warp % l.hidden_columns, rows = band.h1 - band.h0, count = tile.count * rows * p.Wo;
  const bool works = m0 + column * 16 < tile.width;
  const int mine = works ? most(0, ((count + 15) / 16 - fragment + fragments - 1) / fragments) : 0;
  Pixels<kHiddenFragments> pixels;
  locate(act, band.h0, rows, p.Wo, tile.count, fragment, fragments, pixels);
  float sums[kHiddenFragments][2][4] = {};
  const int whole = p.C * E::bytes, lane_row = column * 16 + lane % 8 + lane / 16 * 8;
  for (int tap = 0; tap < 9; tap += l.taps1)
    for (int k = 0; k < whole; k += l.bytes1) {
      const uint32_t weights = ring.turn() + lane_row * s.row1 + lane / 8 % 2 * 16;
      const Operands operands = {
          shared_address() + s.zero + lane / 16 * 16, weights, tap, l.taps1, k, least(l.bytes1, whole - k), 0, mine, 1};
      if (mine == kHiddenFragments)
        multiply<E, kHiddenFragments, 1, false>(sums, act, pixels, operands);
      else if (mine > 0)
        multiply<E, kHiddenFragments - 1, 1, true>(sums, act, pixels, operands);
    }
  if (works)
    write_hidden<E>(p, sums, shared_address() + s.hidden + column * 16 * E::bytes, s.hidden_row, fragment, fragments,
                    count, m0 + column * 16);
}

// One slice of hidden channels, read: sums += conv2 of it.
template <class E>
DEN_KERNELS_DEVICE void use_hidden(const Arguments& arguments, const Tile& tile, int y0, int m0, Ring<E>& ring,
                                   float (&sums)[kOutputFragments][2 * kOutputPairs][4]) {
  const FusedResidual& p = arguments.block;
  const FusedShared& s = arguments.shared;
  const Band band = band_at(p, y0);
  const Source hidden = {shared_address() + s.hidden, s.hidden_row, p.Ho, p.Wo, band.h0, (band.h1 - band.h0) * p.Wo, 1};
  const FusedLayout& l = p.layout;
  const int lane = lane_id(), warp = warp_id();
  const int fragments = kFusedWarps / l.columns, fragment = warp / l.columns, column = warp % l.columns;
  const int rows = band.y1 - band.y0, count = tile.count * rows * p.Wo;
  const int mine = most(0, ((count + 15) / 16 - fragment + fragments - 1) / fragments);
  const int pairs = most(0, (p.C_out / 16 - column + l.columns - 1) / l.columns);
  Pixels<kOutputFragments> pixels;
  locate(hidden, band.y0, rows, p.Wo, tile.count, fragment, fragments, pixels);
  const int whole = least(s.slice, tile.width - m0) * E::bytes, row = s.row2;
  const int lane_row = column * 16 + lane % 8 + lane / 16 * 8;
  for (int tap = 0; tap < 9; tap += l.taps2)
    for (int k = 0; k < whole; k += l.bytes2) {
      const uint32_t weights = ring.turn() + lane_row * row + lane / 8 % 2 * 16;
      const Operands operands = {shared_address() + s.zero + lane / 16 * 16,
                                 weights,
                                 tap,
                                 l.taps2,
                                 k,
                                 least(l.bytes2, whole - k),
                                 16 * l.columns * row,
                                 mine,
                                 pairs};
      if (mine == kOutputFragments && pairs == kOutputPairs)
        multiply<E, kOutputFragments, kOutputPairs, false>(sums, hidden, pixels, operands);
      else if (mine == kOutputFragments && pairs == kOutputPairs / 2)
        multiply<E, kOutputFragments, kOutputPairs / 2, false>(sums, hidden, pixels, operands);
      else
        multiply<E, kOutputFragments, kOutputPairs, true>(sums, hidden, pixels, operands);
    }
}

// One band of a tile, from x to out.
template <class E>
DEN_KERNELS_DEVICE void run_band(const Arguments& arguments, const Tile& tile, int y0) {
  const FusedResidual& p = arguments.block;
  sync_block();  // nobody reads the last band's rows, slices and weights any more
  Ring<E> ring = {arguments, tile.width, 0, {0, 0, 0, false}};
  ring.start();
  load_band<E>(arguments, tile, y0);
  float sums[kOutputFragments][2 * kOutputPairs][4] = {};
  for (int m0 = 0; m0 < tile.width; m0 += arguments.shared.slice) {
    make_hidden(arguments, tile, y0, m0, ring);
    use_hidden(arguments, tile, y0, m0, ring, sums);
  }
  add_to_output<E>(p, tile, y0, sums);
}

// Every other round of tiles goes backward, so that no thread block always gets the heaviest of its round.
template <class E>
__global__ void __launch_bounds__(kThreads, 1) fused_residual_kernel(const __grid_constant__ Arguments arguments) {
  const FusedResidual& p = arguments.block;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  for (int i = thread_id() * 16; i < arguments.shared.act; i += kThreads * 16)
    store_shared(shared_address() + arguments.shared.zero + i, Words<4>{});
  Tile tile = {0, 0, 0};
  const int tiles = find_tile(p, -1, tile);
  for (int round = 0; round * blocks < tiles; ++round) {
    const int place = round * blocks + (round % 2 ? blocks - 1 - block : block);
    if (place >= tiles) continue;
    find_tile(p, place, tile);
    if (tile.width == 0) {
      write_shortcut<E>(p, tile, 0, p.Ho, p.relu);
      continue;
    }
    for (int y0 = 0; y0 < p.Ho; y0 += p.layout.rows) run_band<E>(arguments, tile, y0);
  }
}

template <class E>
void launch_fused(const FusedResidual& block, void* stream) {
  check_fused(block, E::bytes);
  const Arguments arguments = {block, fused_shared(block, E::bytes)};
  if (block.B == 0) return;
  launch("fused_residual_cuda", fused_residual_kernel<E>, block.layout.blocks, kThreads, arguments.shared.total, stream,
         arguments);
}

}  // namespace

int64_t fused_residual_shared(const FusedResidual& block, FusedType type) {
  return fused_shared(block, type == FusedType::tf32 ? 4 : 2).total;
}

void fused_residual_cuda(const FusedResidual& block, FusedType type, void* stream) {
  if (type == FusedType::bfloat16) return launch_fused<Bf16>(block, stream);
  if (type == FusedType::float16) return launch_fused<Fp16>(block, stream);
  launch_fused<Tf32>(block, stream);
}

}  // namespace den_kernels
