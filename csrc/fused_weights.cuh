// The fused residual block: the weights, streamed from global memory through a ring of stages.
#pragma once

#include "fused_maps.cuh"

namespace den_kernels {

// A step of the weights: `taps` taps from `tap`, `bytes` bytes of each row from byte `k`.
struct Step {
  int m0, tap, k;
  bool second;  // conv2
};

// Starts the copies of one step's weights.
template <class E>
DEN_KERNELS_DEVICE void stream(const Arguments& arguments, const Step& step, int width, uint32_t to) {
  const FusedResidual& p = arguments.block;
  const int slice = least(arguments.shared.slice, width - step.m0),
            taps = step.second ? p.layout.taps2 : p.layout.taps1;
  const int tap_pitch = (step.second ? p.M : p.C) * E::bytes, whole = step.second ? slice * E::bytes : tap_pitch;
  const int bytes = least(step.second ? p.layout.bytes2 : p.layout.bytes1, whole - step.k);
  const int rows = step.second ? p.C_out : slice, row = step.second ? arguments.shared.row2 : arguments.shared.row1;
  const unsigned char* from = step.second ? bytes_of(p.conv2) + step.tap * tap_pitch + step.m0 * E::bytes + step.k
                                          : bytes_of(p.conv1) + (step.m0 * 9 + step.tap) * tap_pitch + step.k;
  const int of_tap = here(bytes / 16), pieces = taps * of_tap;
  for (int r = thread_id() / pieces, i = thread_id() % pieces; r < rows;) {
    const int tap = taps == 1 ? 0 : i / of_tap;
    copy_async16(to + r * row + i * 16, from + r * 9 * tap_pitch + tap * tap_pitch + (i - tap * of_tap) * 16);
    r += kThreads / pieces;
    i += kThreads % pieces;
    if (i >= pieces) ++r, i -= pieces;
  }
}

// The ring of weights: `next` runs kFusedStages - 1 steps ahead of the step that is computed.
template <class E>
struct Ring {
  const Arguments& arguments;
  int width, stage;
  Step next;

  DEN_KERNELS_DEVICE uint32_t address(int of) const {
    return shared_address() + arguments.shared.ring + of * arguments.shared.stage;
  }
  // Copies the next step to a stage and moves on; one commit for each step, also behind the last.
  DEN_KERNELS_DEVICE void fill(int to) {
    const FusedResidual& p = arguments.block;
    if (next.m0 < width) {
      stream<E>(arguments, next, width, address(to));
      const int slice = least(arguments.shared.slice, width - next.m0);
      next.k += next.second ? p.layout.bytes2 : p.layout.bytes1;
      if (next.k >= (next.second ? slice : p.C) * E::bytes) {
        next.k = 0;
        next.tap += next.second ? p.layout.taps2 : p.layout.taps1;
        if (next.tap == 9) {
          next.tap = 0;
          if (next.second) next.m0 += arguments.shared.slice;
          next.second = !next.second;
        }
      }
    }
    copy_async_commit();
  }
  DEN_KERNELS_DEVICE void start() {
    for (int s = 0; s < kFusedStages - 1; ++s) fill(s);
  }
  // The address of the step whose turn it is. All threads are behind the step before, whose stage is filled again.
  DEN_KERNELS_DEVICE uint32_t turn() {
    copy_async_wait<kFusedStages - 2>();
    sync_block();
    fill((stage + kFusedStages - 1) % kFusedStages);
    const uint32_t weights = address(stage);
    stage = (stage + 1) % kFusedStages;
    return weights;
  }
};

}  // namespace den_kernels
