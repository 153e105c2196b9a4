// plan_main KIND SCHEDULE B N G: the plan kernels of csrc/plan.cu on a CPU. KIND: int32 or int64 (levels [B, N]), masks
// ([N, B, G] bytes). Writes levels, order, offsets.
#include "../../../csrc/plan.cu"

#include "streams.h"

namespace {

template <class T>
void plan_levels(int64_t B, int64_t N, int64_t G, den_kernels::Plan plan) {
  const std::vector<T> levels = read_array<T>(B * N);
  den_kernels::plan_levels_cuda(levels.data(), N, 1, B, N, G, plan, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string kind = argv[1];
  shim::schedule = schedule_of(argv[2]);
  const std::vector<int64_t> sizes = sizes_of(argc, argv, 3);
  const int64_t B = sizes[0], N = sizes[1], G = sizes[2], S = kind == "masks" ? B : G + 1;
  std::vector<int32_t> levels(N * B, -7), order(N * B, -7), offsets(N * (S + 1), -7);
  const den_kernels::Plan plan = {levels.data(), order.data(), offsets.data()};
  if (kind == "masks") {
    const std::vector<uint8_t> masks = read_array<uint8_t>(N * B * G);
    den_kernels::plan_masks_cuda(masks.data(), B, N, G, plan, nullptr);
  } else if (kind == "int32") {
    plan_levels<int32_t>(B, N, G, plan);
  } else {
    plan_levels<int64_t>(B, N, G, plan);
  }
  write_array(levels);
  write_array(order);
  write_array(offsets);
}
